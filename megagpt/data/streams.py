"""Reading a file from its beginning, plain or compressed, in bounded memory and with damage reported."""

import gzip
import lzma
import os
import zlib

from megagpt.errors import DataError

CHUNK = 1 << 20  # bytes of text handled at a time
MAX_LINE = 64 << 20  # bytes: a longer line is not taken into memory
ENDINGS = (".gz", ".xz", ".zst")
_MAGIC = {
    b"\x1f\x8b": "gz",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"\x50\x2a\x4d\x18": "zst",  # pzstd puts a frame to be skipped before each frame of data
}


class Stream:
    """The decompressed bytes of ``path``. How it is compressed is seen from its first bytes, not from its name.

    Of a plain file, ``start`` and ``stop`` choose a part. ``position`` is how many bytes of it have been consumed,
    ``compressed`` whether it is anything but plain.
    Raises DataError for a file that cannot be read or whose compressed data is damaged or ends too early.
    """

    def __init__(self, path: str, start: int = 0, stop: int | None = None) -> None:
        self.path = path
        self._start, self._stop = start, stop
        try:
            self._raw = open(path, "rb")  # noqa: SIM115 closed by close()
            kind = _kind(self._raw.peek(8))
            self._raw.seek(start)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        self.compressed = bool(kind)
        self._file = {"": lambda raw: raw, "gz": _gzip, "xz": lzma.LZMAFile, "zst": _zstd}[kind](self._raw)

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes; fewer only at the end."""
        if self._stop is not None:
            size = min(size, self._stop - self._raw.tell())
        try:
            return self._file.read(size)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise DataError(
                f"{self.path}: after {self.position:,} bytes: {error or 'damaged'}; get the file again"
            ) from None

    @property
    def position(self) -> int:
        return self._raw.tell() - self._start

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self._raw.close()


def _kind(head: bytes) -> str:
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), "")


def _gzip(raw):
    return gzip.GzipFile(fileobj=raw)


def _zstd(raw):
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{raw.name} is compressed with zstd; to read it: pip install zstandard") from None
    return _Zstd(raw, zstandard)


class _Zstd:
    """Decompresses zstd frames and notices when the last one is cut off, which the library does not.

    A small frame of known content is put behind the file: it comes out at the end if and only if all before it was
    whole.
    """

    _MARK = os.urandom(16)

    def __init__(self, raw, zstandard) -> None:
        self._error = zstandard.ZstdError
        behind = zstandard.ZstdCompressor().compress(self._MARK)
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frames = decompressor.stream_reader(_Then(raw, behind), read_across_frames=True)
        self._held = b""  # read ahead, as it may be the mark

    def read(self, size: int) -> bytes:
        wanted = size + len(self._MARK)
        parts, length = [self._held], len(self._held)
        while length < wanted:
            try:
                part = self._frames.read(wanted - length)
            except self._error as error:
                raise OSError(str(error)) from None
            if not part:
                break
            parts.append(part)
            length += len(part)
        data = b"".join(parts)
        if length == wanted:
            self._held = data[size:]
            return data[:size]
        if not data.endswith(self._MARK):
            raise EOFError("the compressed data ends too early")
        self._held = self._MARK
        return data[: -len(self._MARK)]


class _Then:
    """``raw`` followed by the bytes ``more``, for a reader that only calls ``read``."""

    def __init__(self, raw, more: bytes) -> None:
        self._raw, self._more = raw, more

    def read(self, size: int = -1) -> bytes:
        if data := self._raw.read(size):
            return data
        data, self._more = self._more[:size], self._more[size:]
        return data
