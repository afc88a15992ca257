"""Writing a corpus: tokens and document lengths grow in a work folder and take their final names together at the end.

What was written up to a ``sync`` can be taken up again, so that an interrupted job goes on where it was.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from megagpt.data.indexed import DTYPES, HEADER, MAGIC, IndexedDataset, dtype_for, plain_prefix
from megagpt.data.info import CorpusInfo
from megagpt.data.progress import Progress
from megagpt.data.storage import storage_errors, sync, sync_path, write_atomically
from megagpt.errors import ConfigError, DataError, StorageError
from megagpt.version import __version__

_CHUNK = 1 << 20  # bytes or entries handled at a time
_LONGEST = 2**31 - 1  # tokens of a document: the index has 32 bits for it


@dataclass
class Counts:
    """Running totals over a corpus; adding two blocks' totals gives the totals of both."""

    n_documents: int = 0
    n_tokens: int = 0
    n_words: int = 0
    n_bytes: int = 0
    max_id: int = 0

    def add(self, other: "Counts") -> None:
        for name in ("n_documents", "n_tokens", "n_words", "n_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_id = max(self.max_id, other.max_id)


@dataclass
class WriterState:
    """How far a corpus was known to be on the disk: enough to cut its files there and to go on."""

    counts: Counts = field(default_factory=Counts)
    open_length: int = 0  # tokens of the document that is still being written

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict) -> "WriterState":
        return cls(Counts(**found["counts"]), found["open_length"])


class CorpusWriter:
    """Appends documents to ``folder``/<name>.bin until ``finish`` completes the corpus and names it.

    ``state`` is where an earlier writer of the same folder got to; what lies beyond it is cut off.
    Raises StorageError when the disk is full or refuses.
    """

    def __init__(self, folder: Path, name: str, vocab_size: int, state: WriterState | None = None) -> None:
        self.dtype = dtype_for(vocab_size)
        self.state = state or WriterState()
        self._folder, self._name, self._vocab_size = folder, name, vocab_size
        self._bin_path, self._lengths_path = folder / f"{name}.bin", folder / f"{name}.lengths"
        self._idx_path = folder / f"{name}.idx"
        counts = self.state.counts
        self._bin, self._hash = self._reopen(self._bin_path, counts.n_tokens * self.dtype.itemsize)
        self._lengths, _ = self._reopen(self._lengths_path, counts.n_documents * 4)

    def _reopen(self, path: Path, size: int):
        """``path`` open for appending at ``size``, and the SHA-256 of what it holds up to there."""
        digest = hashlib.sha256()
        with storage_errors(path):
            file = open(path, "ab")  # noqa: SIM115 closed by close()
            if (found := os.fstat(file.fileno()).st_size) < size:
                raise StorageError(
                    f"{path} is {found:,} bytes long and {size:,} were recorded: the disk has lost some; remove "
                    f"{path.parent} and start again"
                )
            file.truncate(size)
            with open(path, "rb") as existing:
                while chunk := existing.read(_CHUNK):
                    digest.update(chunk)
        return file, digest

    def append(self, ids: np.ndarray, lengths: np.ndarray, open_length: int, counts: Counts) -> None:
        """Add ``ids``, which hold ``len(lengths)`` documents that end here and ``open_length`` ids of one that goes on.

        ``lengths`` int64 (n,), in ids that are in this call; the first adds to the document left open by the last call.
        ``counts`` are those of this call, documents that end in it counted.
        """
        if len(ids) and not 0 <= counts.max_id < self._vocab_size:
            raise AssertionError(f"token id {counts.max_id} in a vocabulary of {self._vocab_size}")
        data = np.ascontiguousarray(ids, self.dtype).data.cast("B")
        if len(lengths):
            lengths = lengths.copy()
            lengths[0] += self.state.open_length
            self.state.open_length = 0
        if max(lengths.max(initial=0), self.state.open_length + open_length) > _LONGEST:
            raise DataError(
                f"a document has more than {_LONGEST:,} tokens, which the .idx cannot hold; divide the text with "
                "--document paragraph or line"
            )
        with storage_errors(self._bin_path):
            self._bin.write(data)
            self._lengths.write(lengths.astype(np.int32).tobytes())
        self._hash.update(data)
        self.state.open_length += open_length
        self.state.counts.add(counts)

    def copy(self, dataset: IndexedDataset, progress: Progress) -> None:
        """Add all documents of another corpus, which has a sidecar, and tell ``progress`` how many tokens are done."""
        before = self.state.counts.n_tokens
        for at in range(0, dataset.n_tokens, _CHUNK):
            data = np.ascontiguousarray(dataset.tokens[at : at + _CHUNK], self.dtype).data.cast("B")
            with storage_errors(self._bin_path):
                self._bin.write(data)
            self._hash.update(data)
            done = before + min(at + _CHUNK, dataset.n_tokens)
            progress.update(done, done * self.dtype.itemsize)
        for first in range(0, dataset.n_documents, _CHUNK):
            lengths = dataset.document_lengths(first, min(first + _CHUNK, dataset.n_documents))
            with storage_errors(self._lengths_path):
                self._lengths.write(lengths.astype(np.int32).tobytes())
        names = [each.name for each in fields(Counts)]
        self.state.counts.add(Counts(**{name: getattr(dataset.info, name) for name in names}))

    def sync(self) -> None:
        """Put everything appended so far on the disk, so that ``state`` may be recorded."""
        with storage_errors(self._bin_path):
            sync(self._bin)
            sync(self._lengths)

    def close(self) -> None:
        """Let go of the files. What was not synced may or may not be in them."""
        for file in (self._bin, self._lengths):
            with contextlib.suppress(OSError):  # a full disk has been reported by the write before
                file.close()

    def finish(
        self, prefix: str, tokenizer_json: bytes, tokenizer_sha256: str, eot_id: int | None, settings: dict
    ) -> CorpusInfo:
        """Complete the corpus and name it ``prefix``; its sidecar."""
        info = self.seal(tokenizer_sha256, eot_id, settings)
        publish(self._folder, self._name, prefix, tokenizer_json, info)
        return info

    def seal(self, tokenizer_sha256: str, eot_id: int | None, settings: dict) -> CorpusInfo:
        """Complete the files in the work folder; the sidecar that belongs to them."""
        self.sync()
        return CorpusInfo(
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=self._vocab_size,
            eot_id=eot_id,
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=self._write_index(),
            megagpt_version=__version__,
            settings=settings,
            **asdict(self.state.counts),
        )

    def _write_index(self) -> str:
        """Write the index of the documents appended; its SHA-256."""
        with storage_errors(self._idx_path), open(self._idx_path, "wb") as file:
            digest = hashlib.sha256()
            for part in _index_parts(self._lengths_path, self.state.counts.n_documents, self.dtype):
                file.write(part)
                digest.update(part)
            sync(file)
        return digest.hexdigest()


def _index_parts(lengths_path: Path, n: int, dtype: np.dtype) -> Iterator[bytes]:
    """The bytes of an index, in pieces: every document is one sequence."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    yield HEADER.pack(MAGIC, 1, code, n, n + 1)
    for lengths in _chunks(lengths_path):
        yield lengths.tobytes()
    start = 0
    for lengths in _chunks(lengths_path):
        ends = start + np.cumsum(lengths.astype(np.int64)) * dtype.itemsize
        yield (ends - lengths.astype(np.int64) * dtype.itemsize).tobytes()
        start = ends[-1]
    for first in range(0, n + 1, _CHUNK):
        yield np.arange(first, min(first + _CHUNK, n + 1), dtype=np.int64).tobytes()


def _chunks(path: Path) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while data := file.read(4 * _CHUNK):
            yield np.frombuffer(data, np.int32)


def check_output(output: str) -> None:
    """Raise ConfigError for a prefix under which a corpus would not be found again."""
    if os.path.basename(output) in ("", ".", ".."):
        raise ConfigError(f"--output {output!r} names no files; give a prefix such as data/books")
    if (prefix := plain_prefix(output)) != output:
        raise ConfigError(f"--output {output} is the prefix of several files; leave the ending away: {prefix}")


def publish(folder: Path, name: str, prefix: str, tokenizer_json: bytes, info: CorpusInfo) -> None:
    """Give the sealed corpus ``name`` in ``folder`` its final names, in the place of any corpus there.

    The sidecar goes first and comes last, so at no moment does one stand beside tokens of another corpus. Safe to
    repeat after an interruption.
    """
    with storage_errors(prefix):
        Path(prefix + ".json").unlink(missing_ok=True)
        for ending in (".bin", ".idx"):
            if (folder / f"{name}{ending}").exists():
                os.replace(folder / f"{name}{ending}", prefix + ending)
        sync_path(Path(prefix).absolute().parent)
    write_atomically(Path(prefix + ".tokenizer.json"), tokenizer_json)
    write_atomically(Path(prefix + ".json"), info.to_bytes())
