"""What can be done with finished corpora: describe them, verify every byte, and join them."""

import hashlib
import os
import re
import shutil
from glob import escape, glob
from pathlib import Path

from megagpt.data.indexed import IndexedDataset, plain_prefix
from megagpt.data.info import CorpusInfo
from megagpt.data.progress import Progress
from megagpt.data.storage import storage_errors
from megagpt.data.tokenizer import from_file
from megagpt.data.writer import CorpusWriter, check_output
from megagpt.errors import ConfigError, DataError

_CHUNK = 1 << 24  # bytes hashed at a time


def describe(prefix: str) -> list[tuple[str, str]]:
    """Names and values of what is known about a corpus, without reading its tokens."""
    dataset = IndexedDataset(prefix)
    rows = [
        ("documents", f"{dataset.n_documents:,}"),
        ("tokens", f"{dataset.n_tokens:,} in {dataset.dtype}"),
    ]
    info = dataset.info
    if info is None:
        return [*rows, ("sidecar", "none: made elsewhere, its tokenizer and counts of words and bytes are unknown")]
    rows += [
        ("words", f"{info.n_words:,}"),
        ("bytes of text", f"{info.n_bytes:,}, {info.n_bytes / max(info.n_tokens, 1):.2f} a token"),
        ("vocabulary", f"{info.vocab_size:,}, largest id {info.max_id:,}"),
        ("end of text", "none" if info.eot_id is None else f"id {info.eot_id}"),
        ("tokenizer", f"{dataset.prefix}.tokenizer.json, SHA-256 {info.tokenizer_sha256[:16]}..."),
        ("made by", f"megagpt {info.megagpt_version}"),
    ]
    if skipped := info.settings.get("skipped"):
        rows.append(("skipped", ", ".join(f"{n:,} {reason}" for reason, n in skipped.items())))
    return rows


def verify(prefix: str) -> str:
    """Read all of a corpus and hold it against its sidecar; what was checked, as one line. Raises DataError."""
    dataset = IndexedDataset(prefix)
    dataset.check_index()
    info = dataset.info
    if info is None:
        largest = dataset.largest_id()
        return f"index consistent, largest id {largest:,}; no sidecar, so the tokens themselves cannot be checked"
    for ending, expected in ((".bin", info.bin_sha256), (".idx", info.idx_sha256)):
        if (found := _sha256(dataset.prefix + ending)) != expected:
            raise DataError(
                f"{dataset.prefix}{ending} is not what was written: its SHA-256 is {found[:16]}... and the sidecar's "
                f"{expected[:16]}...; copy or prepare the corpus again"
            )
    if (largest := dataset.largest_id()) != info.max_id or largest >= info.vocab_size:
        raise DataError(
            f"{dataset.prefix}.bin holds ids up to {largest:,}; its sidecar states {info.max_id:,} of a vocabulary of "
            f"{info.vocab_size:,}: prepare the corpus again"
        )
    _check_tokenizer(dataset.prefix, info)
    return f"{info.n_documents:,} documents, {info.n_tokens:,} tokens, tokenizer and all hashes as written"


def _check_tokenizer(prefix: str, info: CorpusInfo) -> None:
    path = prefix + ".tokenizer.json"
    if not os.path.exists(path):
        raise DataError(f"{path} is missing: without it the corpus's ids cannot be read; copy it again")
    if (found := _sha256(path)) != info.tokenizer_sha256:
        raise DataError(
            f"{path} is another tokenizer than the corpus was made with (SHA-256 {found[:16]}... and "
            f"{info.tokenizer_sha256[:16]}...); copy it again"
        )


def _sha256(path: str) -> str:
    digest, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as file, Progress(f"verify {Path(path).name}", size) as progress:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.update(file.tell(), file.tell())
    return digest.hexdigest()


def parts_of(output: str) -> list[str]:
    """The prefixes of all shards of ``output``, in order. Raises DataError where one is missing or of another job."""
    found: dict[int, dict[int, str]] = {}
    for path in glob(f"{escape(output)}-*-of-*.json"):
        match = re.fullmatch(re.escape(output) + r"-([0-9]+)-of-([0-9]+)\.json", path)
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = path.removesuffix(".json")
    if len(found) != 1:
        shown = "no shards" if not found else "shards of several divisions"
        raise DataError(f"{output}-*-of-*: {shown} found; name the corpora to join: megagpt data merge A B --output C")
    n, parts = found.popitem()
    if missing := sorted(set(range(1, n + 1)) - parts.keys()):
        raise DataError(f"{output}-{missing[0]}-of-{n} is missing ({len(missing)} of {n} shards); prepare it first")
    prefixes = [parts[i] for i in sorted(parts)]
    wholes = [_info(IndexedDataset(prefix)).settings.get("whole") for prefix in prefixes]
    for prefix, whole in zip(prefixes, wholes, strict=True):
        if whole != wholes[0]:
            raise DataError(
                f"{prefix} was made from other files or with other settings than {prefixes[0]}; prepare it again"
            )
    return prefixes


def merge(prefixes: list[str], output: str, *, overwrite: bool) -> CorpusInfo:
    """Join corpora of one tokenizer into ``output``, in their order; its sidecar.

    Raises ConfigError, DataError or StorageError.
    """
    check_output(output)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    infos = [_info(dataset) for dataset in datasets]
    for dataset, info in zip(datasets, infos, strict=True):
        if info.tokenizer_sha256 != infos[0].tokenizer_sha256:
            raise DataError(
                f"{dataset.prefix} and {datasets[0].prefix} were made with different tokenizers; prepare one "
                f"of them again with --tokenizer {datasets[0].prefix}.tokenizer.json"
            )
    if output in (plain_prefix(prefix) for prefix in prefixes):
        raise ConfigError(f"--output {output} is one of the corpora to join; choose another name")
    if not overwrite and os.path.exists(output + ".bin"):
        raise ConfigError(f"{output}.bin exists; --overwrite replaces it")
    if not any(dataset.n_documents for dataset in datasets):
        raise DataError(f"none of the {len(datasets)} corpora to join has a document; prepare them from more text")
    tokenizer = from_file(datasets[0].prefix + ".tokenizer.json")
    folder = Path(f"{output}.merging")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        writer = CorpusWriter(folder, "train", infos[0].vocab_size)
        total = sum(dataset.n_tokens for dataset in datasets)
        with Progress("merge", total) as progress:
            for dataset in datasets:
                writer.copy(dataset, progress)
        settings = {"merged": [dataset.prefix for dataset in datasets], "skipped": _skipped(infos)}
        return writer.finish(output, tokenizer.json, tokenizer.sha256, tokenizer.eot_id, settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _info(dataset: IndexedDataset) -> CorpusInfo:
    if dataset.info is None:
        raise DataError(f"{dataset.prefix}.json is missing: without it nothing tells which tokenizer made the corpus")
    return dataset.info


def _skipped(infos: list[CorpusInfo]) -> dict[str, int]:
    total: dict[str, int] = {}
    for info in infos:
        for reason, n in info.settings.get("skipped", {}).items():
            total[reason] = total.get(reason, 0) + n
    return total
