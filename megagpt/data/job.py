"""One run of ``megagpt prepare``: finds or trains the tokenizer, has all blocks tokenised, seals and names the corpora.

Every few seconds everything written is put on the disk together with the place that reading had come to. What an
interrupted run recorded so is where the next one starts.
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

from megagpt.data.bpe import parse_training, train
from megagpt.data.documents import Skipped, no_documents
from megagpt.data.indexed import IndexedDataset
from megagpt.data.info import CorpusInfo
from megagpt.data.prepare import PrepareSettings
from megagpt.data.progress import Progress
from megagpt.data.readers import Block, Reading, blocks
from megagpt.data.sample import Sample
from megagpt.data.sources import Source
from megagpt.data.tokenise import Recipe, Result, Worker
from megagpt.data.tokenizer import from_file, load
from megagpt.data.workers import Workers, available_cores
from megagpt.data.workfolder import WorkFolder
from megagpt.data.writer import CorpusWriter, Counts, WriterState, publish
from megagpt.errors import ConfigError, DataError

_SAVE_EVERY_S = 5.0
_ALONE = 2 << 20  # bytes of input below which starting processes takes longer than the work
_NAMES = ("train", "valid")
_WITHOUT_EFFECT = ("output", "workers", "overwrite", "max_bad_lines")  # settings that don't change what is made


class Job:
    """A corpus being made from ``sources``, which may be one shard, named by ``suffix``, of ``everything``."""

    def __init__(self, settings: PrepareSettings, suffix: str, sources: list[Source], everything: list[Source]) -> None:
        self._settings, self._sources, self._everything = settings, sources, everything
        self._is_whole = not suffix
        self._training = parse_training(settings.tokenizer)
        self._tokenizer = None if self._training else load(settings.tokenizer)
        self._reading = Reading(settings.document, settings.column, settings.quoting)
        self._names = _NAMES if settings.valid_fraction else _NAMES[:1]
        bases = [settings.output, f"{settings.output}-valid"][: len(self._names)]
        self._prefixes = [base + suffix for base in bases]
        self._recorded = {name: v for name, v in asdict(settings).items() if name not in _WITHOUT_EFFECT}
        # Copies of the input on several machines differ in their times: shards are told to belong together without.
        whole = self._fingerprint(shard=None, times=False)
        self._recorded |= {"whole": whole, "fingerprint": self._fingerprint(shard=settings.shard, times=True)}
        self.folder = WorkFolder(Path(f"{settings.output}{suffix}.preparing"), self._recorded["fingerprint"])
        self._skipped = Skipped()

    def _fingerprint(self, *, shard: str | None, times: bool) -> str:
        """A hash of all that the corpus depends on: settings, tokenizer, and the files' names, sizes and times."""
        tokenizer = self._tokenizer.sha256 if self._tokenizer else self._settings.tokenizer
        sources = [asdict(source) | ({} if times else {"mtime_ns": 0}) for source in self._everything]
        content = json.dumps([self._recorded | {"tokenizer": tokenizer, "shard": shard}, sources], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def already_done(self) -> dict[str, CorpusInfo] | None:
        """The sidecars of the corpus if the same job has made it before, else None. ConfigError for another corpus."""
        if self.folder.state():  # it may have been interrupted while it replaced another corpus
            return None
        paths = [prefix + ending for prefix in self._prefixes for ending in (".bin", ".idx", ".json")]
        existing = [path for path in paths if os.path.exists(path)]
        if not existing:
            return None
        with contextlib.suppress(DataError):
            infos = [IndexedDataset(prefix).info for prefix in self._prefixes]
            same = [info and info.settings.get("fingerprint") == self._recorded["fingerprint"] for info in infos]
            if all(same):
                return dict(zip(self._prefixes, infos, strict=True))
        if not self._settings.overwrite:
            raise ConfigError(f"{existing[0]} exists and is not what this command makes; --overwrite replaces it")
        return None

    def run(self) -> dict[str, CorpusInfo]:
        """Do what is left to do; {prefix: sidecar} of the finished corpora."""
        state = self.folder.state()
        if state:
            print(f"going on where an interrupted run stopped ({self.folder.path})")
        else:
            self.folder.clear()
        self._find_tokenizer()
        sealed = state.get("sealed") or self._tokenise(state)
        infos = [CorpusInfo(**found) for found in sealed]
        for name, prefix, info in zip(self._names, self._prefixes, infos, strict=True):
            publish(self.folder.path, name, prefix, self._tokenizer.json, info)
        return dict(zip(self._prefixes, infos, strict=True))

    def _find_tokenizer(self) -> None:
        """Train the tokenizer where one is asked for and an interrupted run has not done so."""
        if self._tokenizer:
            return
        path = self.folder.path / "tokenizer.json"
        if not path.exists():
            print(f"training a tokenizer on up to {self._settings.sample_mb} MB of the text", flush=True)
            settings = self._settings
            sample = Sample(
                self._everything, self._reading, settings.json_key, settings.clean, settings.sample_mb * 10**6
            )
            tokenizer = train(sample, self._training)
            if tokenizer is None:
                raise no_documents(sample.skipped, settings.json_key)
            tokenizer.save(path)
        self._tokenizer = from_file(path)

    def _tokenise(self, state: dict) -> list[dict]:
        """Write all blocks that ``state`` does not cover, and seal the corpora; their sidecars."""
        if state:
            self._skipped = Skipped.from_dict(state["skipped"])
        saved = [WriterState.from_dict(found) for found in state["writers"]] if state else [None] * len(self._names)
        writers = [
            CorpusWriter(self.folder.path, name, self._tokenizer.vocab_size, found)
            for name, found in zip(self._names, saved, strict=True)
        ]
        try:
            self._write_blocks(writers, tuple(state["resume"]) if state else (0, 0))
            self._check_documents(writers)
            skipped = {"skipped": dict(self._skipped.counts), "skipped_examples": self._skipped.examples}
            settings = self._recorded | skipped
            sealed = [
                asdict(writer.seal(self._tokenizer.sha256, self._tokenizer.eot_id, settings)) for writer in writers
            ]
        finally:
            for writer in writers:
                writer.close()
        self.folder.record(sealed=sealed)
        return sealed

    def _write_blocks(self, writers: list[CorpusWriter], resume: tuple[int, int]) -> None:
        """Have the blocks from ``resume`` on tokenised and append what they become, in their order."""
        starts = [0]  # where each source starts in the bytes of the whole input
        for source in self._sources:
            starts.append(starts[-1] + source.n_bytes)
        before = _total(writers).n_bytes
        saved_at = time.monotonic()
        with (
            Workers(self._n_workers(starts[-1]), Worker, self._recipe()) as workers,
            Progress("prepare", starts[-1], starts[resume[0]]) as progress,
        ):
            for block, result in workers.map(blocks(self._sources, self._reading, resume)):
                self._append(writers, result)
                counts = _total(writers)
                source, passed = block.resume
                progress.update(
                    starts[source] + (block.position if passed else 0),
                    counts.n_bytes - before,
                    f"{counts.n_documents:,} documents | {counts.n_tokens / 1e6:.1f} M tokens",
                )
                if time.monotonic() - saved_at > _SAVE_EVERY_S:
                    self._save(writers, block)
                    saved_at = time.monotonic()
        done = _total(writers).n_bytes - before
        print(f"tokenised {done / 1e6:.1f} MB of text at {progress.megabytes_per_s:.1f} MB/s")

    def _n_workers(self, n_bytes: int) -> int:
        wanted = self._settings.workers or (1 if n_bytes < _ALONE else available_cores())
        return 0 if wanted == 1 else wanted  # this process does the work of one

    def _recipe(self) -> Recipe:
        settings = self._settings
        return Recipe(
            self._tokenizer.json,
            settings.tokenizer,
            settings.json_key,
            settings.clean,
            settings.shuffle_sentences,
            settings.valid_fraction,
        )

    def _append(self, writers: list[CorpusWriter], result: Result) -> None:
        for writer, part in zip(writers, result.parts, strict=False):
            writer.append(part.ids, part.lengths, part.open_length, part.counts)
        self._skipped.add(result.skipped)
        limit = self._settings.max_bad_lines
        if limit is not None and self._skipped.bad > limit:
            raise DataError(
                f"more than --max_bad_lines {limit} lines had to be skipped ({self._skipped}); the first: "
                f"{'; '.join(self._skipped.examples)}"
            )

    def _save(self, writers: list[CorpusWriter], block: Block) -> None:
        """Put everything up to and with ``block`` on the disk and record that it is there."""
        for writer in writers:
            writer.sync()
        states = [writer.state.to_dict() for writer in writers]
        self.folder.record(resume=block.resume, writers=states, skipped=self._skipped.to_dict())

    def _check_documents(self, writers: list[CorpusWriter]) -> None:
        found = [writer.state.counts.n_documents for writer in writers]
        if not any(found):
            raise no_documents(self._skipped, self._settings.json_key)
        if not all(found) and self._is_whole:  # of a shard, either side may be empty
            empty = "for validation" if found[0] else "for training"
            raise DataError(
                f"of {sum(found):,} documents none is {empty} with --valid_fraction "
                f"{self._settings.valid_fraction}; change it, or make more documents of the text with "
                "--document paragraph or line"
            )


def _total(writers: list[CorpusWriter]) -> Counts:
    total = Counts()
    for writer in writers:
        total.add(writer.state.counts)
    return total
