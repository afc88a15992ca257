"""Which files an input names, what each of them is, and how they are divided among shards."""

import codecs
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megagpt.data.streams import CHUNK, ENDINGS, Stream
from megagpt.errors import ConfigError, DataError

FORMATS = {  # ending: format
    ".txt": "txt",
    ".text": "txt",
    ".md": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Source:
    """A file, or whole lines of it: the bytes from ``start`` to ``stop``."""

    path: str
    format: str
    size: int  # of the whole file, bytes
    mtime_ns: int
    compressed: bool
    splittable: bool  # not compressed, and every line stands alone
    start: int = 0
    stop: int | None = None  # None for the end of the file

    @property
    def n_bytes(self) -> int:
        return (self.size if self.stop is None else self.stop) - self.start


def find(inputs: list[str], format: str, *, by_line: bool) -> list[Source]:
    """The files that ``inputs`` (files, folders, patterns) name, each once, by input and then by name.

    ``format`` is one of FORMATS' or "auto"; ``by_line`` says that each line of a text file is a document. Of a folder
    all files with a known ending are taken, at any depth. Raises DataError for an input that names nothing.
    """
    paths: dict[str, str] = {}  # by the absolute path, as a file may be named in several ways
    for text in inputs:
        found = _paths(text, format)
        if not found:
            raise DataError(f"--input {text}: {_nothing(text)}")
        for path in found:
            paths.setdefault(os.path.abspath(path), path)
    sources = [_source(path, format, by_line) for path in paths.values()]
    if not any(source.size for source in sources):
        if len(sources) == 1:
            raise DataError(f"--input {sources[0].path}: the file is empty")
        raise DataError(f"--input {' '.join(inputs)}: {len(sources):,} files, all of them empty")
    return [source for source in sources if source.size]


def _paths(text: str, format: str) -> list[str]:
    if os.path.isdir(text):
        return sorted(path for path in _files_below(text) if _wanted(path, format))
    if os.path.exists(text):
        return [text]
    return [path for match in sorted(glob.glob(text, recursive=True)) for path in _paths(match, format)]


def _files_below(folder: str) -> Iterator[str]:
    """All files that are not hidden, those behind links to folders too, though no folder twice."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real in seen:
            continue
        seen.add(real)
        yield from (os.path.join(place, name) for name in names if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}")


def _wanted(path: str, format: str) -> bool:
    known = _format_by_name(path)
    return known is not None and (format == "auto" or known == format)


def _nothing(text: str) -> str:
    if os.path.isdir(text):
        endings = f"{', '.join(FORMATS)} (or these with {', '.join(ENDINGS)})"
        return f"no file in this folder ends in {endings}; name others by a pattern, as in '{os.path.join(text, '*')}'"
    if glob.has_magic(text):
        return "no file matches; quote the pattern so that the shell leaves it as it is"
    return "no such file or folder"


def _format_by_name(path: str) -> str | None:
    return FORMATS.get(os.path.splitext(_plain_name(path))[1].lower())


def _plain_name(path: str) -> str:
    for ending in ENDINGS:
        path = path.removesuffix(ending)
    return path


def _source(path: str, format: str, by_line: bool) -> Source:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not os.path.isfile(path):
        raise DataError(f"--input {path} is a pipe or a device; write its text to a file first")
    chosen = format if format != "auto" else _format_by_name(path)
    with Stream(path) as stream:
        compressed, head = stream.compressed, stream.read(4 if chosen else CHUNK)
    if stat.st_size and not compressed and path.endswith(ENDINGS):
        raise DataError(f"{path} is not compressed as its name says; get the file again or rename it")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16; convert it first: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    chosen = chosen or _sniffed(path, head)
    splittable = not compressed and (chosen == "jsonl" or (chosen == "txt" and by_line))
    return Source(path, chosen, stat.st_size, stat.st_mtime_ns, compressed, splittable)


def _sniffed(path: str, head: bytes) -> str:
    """The format of a file with an unknown ending, from its first bytes. Raises DataError where it is not text."""
    if _plain_name(path).endswith(".json"):  # not looked for in folders, where it may hold anything
        return "jsonl"
    try:
        head.decode(errors="strict")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # not merely the last character cut in two
            raise DataError(_unknown(path)) from None
    if b"\0" in head:
        raise DataError(_unknown(path))
    return "txt"


def _unknown(path: str) -> str:
    kinds = ", ".join(dict.fromkeys(FORMATS.values()))
    return f"{path}: its ending is unknown and it is not UTF-8 text; say what it is with --format ({kinds})"


def shard(sources: list[Source], i: int, n: int) -> list[Source]:
    """Part ``i`` of ``n`` (from 1 on): parts 1 to n hold everything once, in order, about equally many bytes each.

    Files in which lines stand alone are cut at any line, others are whole. Raises ConfigError for an empty part.
    """
    total = sum(source.size for source in sources)
    first, stop = total * (i - 1) // n, total * i // n
    part, at = [], 0
    for source in sources:
        begin, end = max(first - at, 0), min(stop - at, source.size)
        if source.splittable:
            part.extend(part_of(source, begin, end))
        elif first <= at + source.size // 2 < stop:
            part.append(source)
        at += source.size
    if not part:
        raise ConfigError(
            f"--shard {i}/{n} has nothing to do: the {len(sources)} input files cannot be cut into that many parts; "
            "use fewer shards, or more files"
        )
    return part


def part_of(source: Source, begin: int, end: int) -> list[Source]:
    """The lines of a splittable file that begin in bytes ``begin`` to ``end``: a list of one source, or of none."""
    if begin >= end:
        return []
    start, stop = _line_start(source, begin), _line_start(source, end)
    if start >= stop:
        return []
    return [source if stop - start == source.size else replace(source, start=start, stop=stop)]


def _line_start(source: Source, at: int) -> int:
    """The first byte from ``at`` on at which a line begins; the file's size where none does."""
    if at == 0:
        return 0
    with open(source.path, "rb") as file:
        file.seek(at - 1)
        while chunk := file.read(CHUNK):
            if (end := chunk.find(b"\n")) >= 0:
                return file.tell() - len(chunk) + end + 1
    return source.size
