"""Reading tokenised corpora: Megatron-LM's ``.bin``/``.idx`` pair (MMIDIDX version 1) and its sidecar.

``<prefix>.bin`` is all tokens, one after the other. ``<prefix>.idx``, little-endian throughout:

    offset  content
    0       b"MMIDIDX\\0\\0"
    9       uint64   version, 1
    17      uint8    dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
    18      uint64   S, number of sequences
    26      uint64   D, number of document boundaries, one more than documents
    34      int32    (S,)  tokens of each sequence
            int64    (S,)  byte at which each sequence starts in the .bin
            int64    (D,)  sequence at which each document starts; the last entry is S
            int8     (S,)  modes, only in multimodal data

For example two documents of 3 and 2 tokens in uint16: lengths [3, 2], pointers [0, 6], documents [0, 1, 2].

Nothing in the files is believed: counts are held against the files' sizes before anything is mapped.
"""

import hashlib
import mmap
import os
import struct
from pathlib import Path

import numpy as np

from megagpt.data.info import CorpusInfo
from megagpt.errors import DataError, nearest

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # codes that can hold ids

_CHECKED_AT_OPEN = 1 << 20  # sequences whose every length and pointer is checked when a corpus is opened
_READ_AT_START = 1 << 30  # bytes of tokens that are read in a second or so
_CHUNK = 1 << 18  # entries looked at together, so that a check of any corpus needs a few megabytes


def dtype_for(vocab_size: int) -> np.dtype:
    """The type that Megatron-LM gives to the tokens of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def plain_prefix(path: str | os.PathLike) -> str:
    """``path`` without the ending of one of a corpus's files."""
    path = os.fspath(path)
    for ending in (".bin", ".idx", ".tokenizer.json", ".json"):
        if path.endswith(ending):
            return path[: -len(ending)]
    return path


class IndexedDataset:
    """A corpus of documents, mapped into memory read-only. ``path`` is its prefix or one of its files.

    ``tokens`` is flat, of ``dtype`` (n_tokens,); ``info`` is the sidecar, or None for a corpus without one. Opening
    reads a few pages whatever the size of the corpus. Raises DataError for files that are missing, truncated, foreign
    or contradict each other.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.prefix = plain_prefix(path)
        self._bin_path, self._idx_path = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        self._bin, self._bin_bytes = _map(self._bin_path, self.prefix)
        self._idx, idx_bytes = _map(self._idx_path, self.prefix)
        code, n_sequences, n_boundaries = _read_header(self._idx_path, self._idx, idx_bytes)
        self.dtype = np.dtype(DTYPES[code])
        if self._bin_bytes % self.dtype.itemsize:
            raise self._broken(f"{self._bin_bytes:,} bytes are no whole number of {self.dtype} tokens")
        self.tokens = np.frombuffer(self._bin, self.dtype) if self._bin_bytes else np.empty(0, self.dtype)
        self.n_tokens = len(self.tokens)
        self.n_documents = n_boundaries - 1
        self._map_index(n_sequences, n_boundaries)
        self._check_ends()
        if n_sequences <= _CHECKED_AT_OPEN:
            self.check_index()
        self.info = CorpusInfo.read(Path(self.prefix + ".json"))
        self._check_info()
        self._limit: int | None = None
        self._views: np.ndarray | None = None  # (n_tokens - length + 1, length), row i the tokens from i on
        self._fits_in_memory = self._bin_bytes < _physical_memory() // 2
        if not self._fits_in_memory and hasattr(mmap, "MADV_RANDOM"):
            self._bin.madvise(mmap.MADV_RANDOM)  # windows are read in random order: reading around them is waste

    def _map_index(self, n_sequences: int, n_boundaries: int) -> None:
        at = HEADER.size
        self._lengths = np.frombuffer(self._idx, np.int32, n_sequences, at)
        at += self._lengths.nbytes
        self._pointers = np.frombuffer(self._idx, np.int64, n_sequences, at)
        at += self._pointers.nbytes
        self._boundaries = np.frombuffer(self._idx, np.int64, n_boundaries, at)

    def __len__(self) -> int:
        return self.n_documents

    def document(self, i: int) -> np.ndarray:
        """The tokens of document ``i``, of ``dtype``, a view of the file."""
        if not 0 <= i < self.n_documents:
            raise IndexError(f"document {i} of {self.n_documents}")
        first, stop = int(self._boundaries[i]), int(self._boundaries[i + 1])
        if not 0 <= first <= stop <= len(self._lengths):
            raise self._broken(f"document {i} lies outside the sequences", self._idx_path)
        begin, end = self._token(first), self._token(stop)
        if not 0 <= begin <= end <= self.n_tokens:
            raise self._broken(f"document {i} lies outside the tokens")
        return self.tokens[begin:end]

    def _token(self, sequence: int) -> int:
        """The first token of a sequence; the one after the last sequence starts where the tokens end."""
        if sequence == len(self._pointers):
            return self.n_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def document_lengths(self, first: int, stop: int) -> np.ndarray:
        """Tokens of documents ``first`` to ``stop``, int64 (stop - first,)."""
        sequences = self._boundaries[first : stop + 1]
        begins = np.full(len(sequences), self._bin_bytes)
        inside = sequences < len(self._pointers)
        begins[inside] = self._pointers[sequences[inside]]
        return np.diff(begins) // self.dtype.itemsize

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The ``length`` tokens from each of ``starts`` on, of ``dtype`` (len(starts), length), copied.

        Raises DataError when the file has been cut short since it was opened, and for ids that are to be refused.
        """
        self.check_unchanged()
        if not self._fits_in_memory:
            self._prefetch(starts.tolist(), length)
        if self._views is None or self._views.shape[1] != length:
            self._views = np.lib.stride_tricks.sliding_window_view(self.tokens, length)
        rows = self._views[starts]  # one gather: twice as fast as a loop over rows
        if self._limit is not None and rows.size and not 0 <= rows.min() <= rows.max() < self._limit:
            raise DataError(
                f"{self._bin_path} has ids from {rows.min():,} to {rows.max():,}, which a vocabulary of "
                f"{self._limit:,} does not have; prepare it with the model's tokenizer"
            )
        return rows

    def _prefetch(self, starts: list[int], length: int) -> None:
        """Have the disk fetch all windows of a batch at once instead of one page fault after another."""
        if hasattr(mmap, "MADV_WILLNEED"):
            size = self.dtype.itemsize
            for start in starts:
                page = start * size // mmap.PAGESIZE * mmap.PAGESIZE
                self._bin.madvise(mmap.MADV_WILLNEED, page, (start + length) * size - page)

    def check_unchanged(self) -> None:
        """Raise DataError where the file is no longer as long as it was: touching what is gone kills the process."""
        if self._bin and (found := self._bin.size()) != self._bin_bytes:
            raise self._broken(f"it was {self._bin_bytes:,} bytes long when opened and is now {found:,}")

    def _check_ends(self) -> None:
        """First and last entries of the index against the tokens: what can be known without reading all of it."""
        n_sequences = len(self._lengths)
        if self._boundaries[0] != 0 or self._boundaries[-1] != n_sequences:
            raise self._broken("the document list does not cover the sequences", self._idx_path)
        expected = self.n_tokens * self.dtype.itemsize
        covered = 0
        if n_sequences:
            covered = int(self._pointers[-1]) + int(self._lengths[-1]) * self.dtype.itemsize
            if self._pointers[0] != 0:
                raise self._broken("the first sequence does not start at byte 0", self._idx_path)
        if covered != expected:
            raise self._broken(f"the index describes {covered:,} bytes of tokens and the file has {expected:,}")

    def check_index(self) -> None:
        """Raise DataError unless every length, pointer and document boundary of the index is consistent."""
        size, n_sequences = self.dtype.itemsize, len(self._lengths)
        expected = 0
        for at in range(0, n_sequences, _CHUNK):
            lengths = self._lengths[at : at + _CHUNK].astype(np.int64)
            ends = expected + np.cumsum(lengths) * size
            if lengths.min() < 0 or not np.array_equal(self._pointers[at : at + _CHUNK], ends - lengths * size):
                raise self._broken(f"pointers do not follow from lengths at sequence {at:,} or later", self._idx_path)
            expected = int(ends[-1])
        for at in range(0, self.n_documents, _CHUNK):
            if (np.diff(self._boundaries[at : at + _CHUNK + 1]) < 0).any():
                raise self._broken(f"the document list is not in order at document {at:,} or later", self._idx_path)

    def _check_info(self) -> None:
        if self.info is None:
            return
        for name in ("n_tokens", "n_documents"):
            stated, found = getattr(self.info, name), getattr(self, name)
            if stated != found:
                raise self._broken(
                    f"its sidecar states {name} = {stated:,} and the files have {found:,}", Path(self.prefix + ".json")
                )

    def needed_vocabulary(self) -> int | None:
        """How many rows a model needs for this corpus: as the sidecar says, else found by reading all tokens.

        None for a corpus without a sidecar that is too large for that; see ``refuse_ids_from``.
        """
        if self.info is not None:
            return max(self.info.vocab_size, self.info.max_id + 1)
        return self.largest_id() + 1 if self._bin_bytes <= _READ_AT_START else None

    def refuse_ids_from(self, limit: int) -> None:
        """Have ``read`` raise DataError for windows with an id from ``limit`` on or below zero."""
        self._limit = limit

    def largest_id(self) -> int:
        """The largest id among the tokens, all of which are read. Raises DataError for a negative one."""
        largest = 0
        for at in range(0, self.n_tokens, _CHUNK):
            chunk = self.tokens[at : at + _CHUNK]
            if chunk.min() < 0:
                raise self._broken(f"it has a negative token id at or after token {at:,}")
            largest = max(largest, int(chunk.max()))
        return largest

    def identity(self) -> dict:
        """What tells this corpus from another: sizes, and the sidecar's hash or one over samples of the file."""
        digest = self.info.bin_sha256 if self.info else self._sampled_hash()
        return {"n_tokens": self.n_tokens, "n_documents": self.n_documents, "dtype": str(self.dtype), "sha256": digest}

    def _sampled_hash(self) -> str:
        """SHA-256 over 64 pages evenly spread over the tokens, as all of them may be too many to read at start."""
        digest = hashlib.sha256()
        for k in range(64):
            at = self._bin_bytes * k // 64
            digest.update(self._bin[at : at + 4096] if self._bin_bytes else b"")
        return "sampled:" + digest.hexdigest()

    def _broken(self, reason: str, path: Path | None = None) -> DataError:
        return DataError(f"{path or self._bin_path}: {reason}; copy or prepare the corpus again")


def _map(path: Path, prefix: str) -> tuple["mmap.mmap | bytes", int]:
    """The file mapped read-only, and its size. An empty file cannot be mapped and is given as no bytes."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return (mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""), size
    except FileNotFoundError:
        raise DataError(_missing(path, prefix)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _missing(path: Path, prefix: str) -> str:
    """Text that was not prepared yet is told from a misspelt prefix, and Megatron-LM's ending is known."""
    if inside := sorted(Path(prefix).glob("*.idx")):
        return f"{prefix} is a folder; give the prefix of a corpus in it, {str(inside[0].with_suffix(''))!r} say"
    if os.path.exists(prefix):
        return (
            f"{prefix} is no corpus (there is no {path}); make one of it with `megagpt prepare --input {prefix} "
            "--output PREFIX` and give its prefix"
        )
    longer = f"{prefix}_text_document"
    if os.path.exists(longer + ".idx"):
        hint = f" (did you mean {longer!r}?)"
    else:
        hint = nearest(prefix, [str(index.with_suffix("")) for index in Path(prefix).parent.glob("*.idx")])
    return f"{path} does not exist{hint}; `megagpt prepare` writes it"


def _read_header(path: Path, data, size: int) -> tuple[int, int, int]:
    """dtype code, number of sequences, number of document boundaries; all checked against ``size``, the file's."""
    if size < HEADER.size:
        raise DataError(f"{path} is {size} bytes long and an index has at least {HEADER.size}; copy it again")
    magic, version, code, n_sequences, n_boundaries = HEADER.unpack(data[: HEADER.size])
    if magic != MAGIC:
        raise DataError(f"{path} is not an index of tokens: it starts with {magic!r} instead of {MAGIC!r}")
    if version != 1:
        raise DataError(f"{path} has index version {version} and this release reads version 1")
    if code not in DTYPES:
        raise DataError(f"{path} says that tokens have type code {code}; ids have one of {sorted(DTYPES)}")
    if n_boundaries < 1:
        raise DataError(f"{path} lists no documents; prepare the corpus again")
    needed = HEADER.size + 12 * n_sequences + 8 * n_boundaries
    if size not in (needed, needed + n_sequences):
        raise DataError(
            f"{path} is {size:,} bytes long, but {n_sequences:,} sequences and {n_boundaries - 1:,} documents need "
            f"{needed:,}; it is truncated or damaged: copy or prepare the corpus again"
        )
    return code, n_sequences, n_boundaries


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
