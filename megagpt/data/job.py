"""One run of ``megagpt prepare``: the folder it works in, what it records there, and how it goes on if interrupted.

``<output>.preparing/`` holds the growing corpus and state.json: the place that reading had come to and how long the
files were when all of it was last on the disk. It is removed when the corpus has its names or the input is at fault.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from megagpt.data.bpe import parse_training, train
from megagpt.data.documents import NO_KEY, Skipped
from megagpt.data.info import CorpusInfo
from megagpt.data.prepare import PrepareSettings
from megagpt.data.progress import Progress
from megagpt.data.readers import Block, Reading, blocks
from megagpt.data.sample import sample_texts
from megagpt.data.sources import Source
from megagpt.data.storage import storage_errors, write_atomically
from megagpt.data.tokenise import Recipe, Result, Worker
from megagpt.data.tokenizer import from_file, load
from megagpt.data.workers import Workers, available_cores
from megagpt.data.writer import CorpusWriter, Counts, WriterState, publish
from megagpt.errors import ConfigError, DataError, nearest

_SAVE_EVERY_S = 5.0
_ALONE = 2 << 20  # bytes of input below which starting processes takes longer than the work
_NAMES = ("train", "valid")


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
        self._folder = Path(f"{settings.output}{suffix}.preparing")
        self._fingerprint = self._hash_of_everything()
        self._skipped = Skipped()

    def _hash_of_everything(self) -> str:
        """Of all that the corpus depends on: settings, tokenizer, and the input files' names, sizes and times."""
        left_out = ("output", "workers", "overwrite", "max_bad_lines")
        settings = {name: value for name, value in asdict(self._settings).items() if name not in left_out}
        settings["tokenizer"] = self._tokenizer.sha256 if self._tokenizer else self._settings.tokenizer
        sources = [asdict(source) for source in self._everything]
        return hashlib.sha256(json.dumps([settings, sources], sort_keys=True).encode()).hexdigest()

    def already_done(self) -> dict[str, CorpusInfo] | None:
        """The sidecars of the corpus if the same job has made it before, else None. ConfigError for another corpus."""
        if self._state():  # it may have been interrupted while it replaced another corpus
            return None
        existing = [ending for ending in (".bin", ".idx", ".json") if os.path.exists(self._prefixes[0] + ending)]
        if not existing:
            return None
        with contextlib.suppress(DataError):
            infos = [CorpusInfo.read(Path(prefix + ".json")) for prefix in self._prefixes]
            if all(info and info.settings.get("fingerprint") == self._fingerprint for info in infos):
                return dict(zip(self._prefixes, infos, strict=True))
        if not self._settings.overwrite:
            path = self._prefixes[0] + existing[0]
            raise ConfigError(f"{path} exists and was made from something else; --overwrite replaces it")
        return None

    @contextlib.contextmanager
    def work_folder(self) -> Iterator[None]:
        """The folder in which the corpus grows, locked; it stays where an interrupted run can go on from it."""
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = open(self._folder / "lock", "w")  # noqa: SIM115 closed below
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is preparing {self._prefixes[0]}; wait for it to end") from None
            try:
                yield
            except (ConfigError, DataError):  # the same command would fail again
                shutil.rmtree(self._folder, ignore_errors=True)
                raise
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self) -> dict[str, CorpusInfo]:
        """Do what is left to do; {prefix: sidecar} of the finished corpora."""
        state = self._state()
        if state:
            print(f"going on where an interrupted run stopped ({self._folder})")
        else:
            self._clear()
        self._find_tokenizer()
        if "sealed" not in state:
            state = self._tokenise(state)
        infos = [CorpusInfo(**found) for found in state["sealed"]]
        for name, prefix, info in zip(self._names, self._prefixes, infos, strict=True):
            publish(self._folder, name, prefix, self._tokenizer.json, info)
        return dict(zip(self._prefixes, infos, strict=True))

    def _state(self) -> dict:
        """What an interrupted run of the same job recorded; empty where there is none."""
        try:
            state = json.loads((self._folder / "state.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return state if state.get("fingerprint") == self._fingerprint else {}

    def _record(self, **state) -> None:
        write_atomically(self._folder / "state.json", json.dumps({"fingerprint": self._fingerprint, **state}).encode())

    def _clear(self) -> None:
        with storage_errors(self._folder):
            for path in self._folder.iterdir():
                if path.name != "lock":
                    path.unlink()

    def _find_tokenizer(self) -> None:
        """Train the tokenizer where one is asked for and an interrupted run has not done so."""
        if self._tokenizer:
            return
        path = self._folder / "tokenizer.json"
        if not path.exists():
            print(f"training a tokenizer on up to {self._settings.sample_mb} MB of the text", flush=True)
            texts = sample_texts(
                self._everything,
                self._reading,
                self._settings.json_key,
                clean=self._settings.clean,
                n_bytes=self._settings.sample_mb * 10**6,
                skipped=self._skipped,
            )
            tokenizer = train(texts, self._training)
            if tokenizer is None:
                raise self._no_documents()
            tokenizer.save(path)
            self._skipped = Skipped()  # the same lines are counted again when they are tokenised
        self._tokenizer = from_file(path)

    def _tokenise(self, state: dict) -> dict:
        """Write all blocks that ``state`` does not cover, and seal the corpora."""
        self._skipped = Skipped.from_dict(state["skipped"]) if state else Skipped()
        saved = state.get("writers") or [None] * len(self._names)
        writers = [
            CorpusWriter(
                self._folder, name, self._tokenizer.vocab_size, WriterState.from_dict(found) if found else None
            )
            for name, found in zip(self._names, saved, strict=True)
        ]
        try:
            self._write_blocks(writers, tuple(state.get("resume", (0, 0))))
            self._check_documents(writers)
            settings = {
                "fingerprint": self._fingerprint,
                **asdict(self._settings),
                "skipped": dict(self._skipped.counts),
                "skipped_examples": self._skipped.examples,
            }
            sealed = [
                asdict(writer.seal(self._tokenizer.sha256, self._tokenizer.eot_id, settings)) for writer in writers
            ]
        finally:
            for writer in writers:
                writer.close()
        self._record(sealed=sealed)
        return {"sealed": sealed}

    def _write_blocks(self, writers: list[CorpusWriter], resume: tuple[int, int]) -> None:
        settings = self._settings
        recipe = Recipe(
            self._tokenizer.json,
            settings.json_key,
            settings.clean,
            settings.shuffle_sentences,
            settings.valid_fraction,
        )
        sizes = [0]
        for source in self._sources:
            sizes.append(sizes[-1] + source.n_bytes)
        alone = sizes[-1] < _ALONE and not settings.workers
        n_workers = 0 if alone or settings.workers == 1 else settings.workers or available_cores()
        before = _total(writers).n_bytes
        progress = Progress("prepare", sizes[-1], sizes[resume[0]])
        saved_at = time.monotonic()
        with Workers(n_workers, Worker, recipe) as workers, progress:
            for block, result in workers.map(blocks(self._sources, self._reading, resume)):
                self._append(writers, result)
                counts = _total(writers)
                source, passed = block.resume
                progress.update(
                    sizes[source] + (block.position if passed else 0),
                    counts.n_bytes - before,
                    f"{counts.n_documents:,} documents | {counts.n_tokens / 1e6:.1f} M tokens",
                )
                if time.monotonic() - saved_at > _SAVE_EVERY_S:
                    self._save(writers, block)
                    saved_at = time.monotonic()
        self.megabytes_per_s = progress.megabytes_per_s

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
        self._record(
            resume=block.resume,
            writers=[writer.state.to_dict() for writer in writers],
            skipped=self._skipped.to_dict(),
        )

    def _check_documents(self, writers: list[CorpusWriter]) -> None:
        found = [writer.state.counts.n_documents for writer in writers]
        if not any(found):
            raise self._no_documents()
        if not all(found) and self._is_whole:  # of a shard, either side may be empty
            empty = "for validation" if found[0] else "for training"
            raise DataError(
                f"of {sum(found):,} documents none is {empty} with --valid_fraction "
                f"{self._settings.valid_fraction}; change it, or make more documents of the text with "
                "--document paragraph or line"
            )

    def _no_documents(self) -> DataError:
        skipped, key = self._skipped, self._settings.json_key
        reasons = str(skipped) or "the files hold nothing but white space"
        hint = ""
        if skipped.counts[NO_KEY]:
            keys = [name for name, _ in skipped.keys.most_common(8)]
            listed = ", ".join(keys)
            hint = f"; there is no key {key!r}{nearest(key, keys)}, but {listed}: choose one with --json_key"
        first = f"; the first: {skipped.examples[0]}" if skipped.examples else ""
        return DataError(f"the input has no documents: {reasons}{first}{hint}")


def _total(writers: list[CorpusWriter]) -> Counts:
    total = Counts()
    for writer in writers:
        total.add(writer.state.counts)
    return total
