"""``megagpt prepare``: files of text to a tokenised corpus, on all cores, in bounded memory, resumable.

    sources --readers--> blocks --workers--> ids --writer--> <output>.preparing/ --publish--> <output>.bin .idx .json

Blocks are written in the order they are read, so the corpus depends on the input alone. Every few seconds all that was
written is put on the disk together with the place reading had come to; the same command goes on from there.
"""

import re
from dataclasses import dataclass
from typing import Literal

from megagpt.data import stdlib_corpus
from megagpt.data.info import CorpusInfo
from megagpt.data.sources import Source, find, shard
from megagpt.data.writer import check_output
from megagpt.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class PrepareSettings:
    """Turn text files into a tokenised corpus: OUTPUT.bin, .idx, .json and .tokenizer.json."""

    output: str
    """prefix of the corpus's files, as in data/books"""
    input: tuple[str, ...] = ()
    """files, folders or quoted patterns: .txt .jsonl .csv .tsv .parquet, each also .gz .xz .zst"""
    corpus: str | None = None
    """instead of --input: python-stdlib, the standard library of this Python, which needs no download"""
    tokenizer: str = "train:8192"
    """train:N, train:N:wordend, gpt1, gpt2, a tokenizer.json, or a folder with vocabulary files"""
    json_key: str = "text"
    """the key of the text in .jsonl files"""
    column: str = "text"
    """the column of the text in tables: its name, or its number from 1 on where there is no header line"""
    document: Literal["file", "paragraph", "line"] = "file"
    """what is a document in .txt files"""
    format: Literal["auto", "txt", "jsonl", "csv", "tsv", "parquet"] = "auto"
    """what the files are, whatever their names end in"""
    quoting: Literal["auto", "standard", "none"] = "auto"
    """quotes in tables; auto: they quote in .csv and are ordinary characters in .tsv"""
    clean: Literal["none", "gpt1"] = "none"
    """gpt1: the cleaning that GPT-1's authors applied to their text"""
    shuffle_sentences: bool = False
    """shuffle the sentences of each document, to see what long stretches of text are worth"""
    valid_fraction: float = 0.0
    """share of the documents that go to OUTPUT-valid instead; equal documents stay together"""
    shard: str = "1/1"
    """i/n: only part i of n, to OUTPUT-i-of-n; `megagpt data merge --output OUTPUT` joins the parts"""
    workers: int = 0
    """processes; 0 for one a core"""
    sample_mb: int = 64
    """text that a tokenizer is trained on, in MB"""
    max_bad_lines: int | None = None
    """stop when more lines than this had to be skipped"""
    overwrite: bool = False
    """replace an existing corpus of the same name"""


def prepare(settings: PrepareSettings) -> dict[str, CorpusInfo]:
    """Make the corpus that ``settings`` describe; {prefix: sidecar} of the training set and of any validation set.

    Raises ConfigError, DataError or StorageError; then no file of the corpus has been touched.
    """
    from megagpt.data.job import Job

    i, n = _check(settings)
    everything = _sources(settings)
    sources = everything if n == 1 else shard(everything, i, n)
    _check_split(settings, everything)
    suffix = "" if n == 1 else f"-{i}-of-{n}"
    job = Job(settings, suffix, sources, everything)
    if (done := job.already_done()) is not None:
        print(f"{settings.output}{suffix} is up to date: made from the same files with the same settings")
        return done
    with job.folder.held():
        return job.run()


def _check(settings: PrepareSettings) -> tuple[int, int]:
    """Part and number of parts; raises ConfigError for settings that cannot be."""
    if not 0 <= settings.valid_fraction < 1:
        raise ConfigError(f"--valid_fraction {settings.valid_fraction} is not in the range from 0 to below 1")
    if settings.workers < 0 or settings.sample_mb < 1:
        raise ConfigError("--workers cannot be negative, and --sample_mb has to be at least 1")
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", settings.shard)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard {settings.shard}: it takes i/n with i from 1 to n, as in 3/8")
    if settings.corpus is not None and settings.input:
        raise ConfigError("--corpus and --input both say what to read; give one of them")
    if settings.corpus not in (None, stdlib_corpus.NAME):
        hint = nearest(settings.corpus, [stdlib_corpus.NAME])
        raise ConfigError(
            f"--corpus {settings.corpus!r} is not {stdlib_corpus.NAME!r}{hint}; --input reads your own files"
        )
    check_output(settings.output)
    return int(found[1]), int(found[2])


def _check_split(settings: PrepareSettings, sources: list[Source]) -> None:
    """Raise DataError for a single document that is to be split, before it is read."""
    if settings.valid_fraction and settings.document == "file" and [source.format for source in sources] == ["txt"]:
        raise DataError(
            f"{sources[0].path} is one document, and --valid_fraction splits whole documents; make more of the text "
            "with --document paragraph or line"
        )


def _sources(settings: PrepareSettings) -> list[Source]:
    if settings.input:
        return find(list(settings.input), settings.format, by_line=settings.document == "line")
    if settings.corpus is None:
        print("no --input: taking the embedded corpus, the standard library of this Python")
    return find(stdlib_corpus.files(), "txt", by_line=settings.document == "line")
