"""From files to blocks: a megabyte or so of whole documents, as they stand in the file, ready to be sent to a worker.

The cuts depend on the files alone, not on the machine, so an interrupted job goes on at the block it had reached.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from megagpt.data import tables
from megagpt.data.sources import Source
from megagpt.data.streams import CHUNK, MAX_LINE, Stream

_SAFE_CUTS = (  # where a piece of a long text may end: before white space between words; before any character
    re.compile(rb"[A-Za-z0-9](?= [A-Za-z0-9])"),
    re.compile(rb"(?:[!-~]|[\xe3-\xef][\x80-\xbf]{2}(?<!\xe3\x80\x80))(?=[ \n\t])"),
    re.compile(rb".(?=[\x00-\x7f\xc2-\xf4])", re.DOTALL),
)
_HEAD = 20480  # bytes of a long document's start that go with each of its later pieces
_LAST_RESORT = 8 * CHUNK  # bytes without a space between words after which a text is cut anywhere


@dataclass(frozen=True)
class Block:
    """Documents to be tokenised together.

    ``kind``: "jsonl" and "lines", bytes of whole lines; "paragraphs", bytes that end at a blank line; "files", a list
    of whole files' bytes; "texts", a list of str (None for a row without text). A file too long for one block is cut
    into blocks of its own: ``begins`` and ``ends`` say whether the document does so here.
    """

    kind: str
    data: bytes | list
    origin: str  # file, for messages
    line: int = 1  # number of the first line
    begins: bool = True
    ends: bool = True
    head: bytes = b""  # the start of the document, where it doesn't begin here
    too_long: tuple[int, ...] = ()  # lines skipped for their length
    resume: tuple[int, int] = (0, 0)  # where reading goes on after it: source, blocks of it to pass over
    position: int = 0  # bytes of the source consumed


@dataclass(frozen=True)
class Reading:
    """How files are read: ``document`` of text files is "file", "paragraph" or "line"; the rest is for tables."""

    document: str = "file"
    column: str = "text"
    quoting: str = "auto"


def blocks(sources: list[Source], reading: Reading, resume: tuple[int, int] = (0, 0)) -> Iterator[Block]:
    """All blocks of ``sources`` in order, from ``resume`` on. Raises DataError."""
    at, passed = resume
    while at < len(sources):
        group = _small_files(sources, at, reading)
        if group:
            at += len(group)
            yield Block("files", list(map(_whole, group)), group[0].path, resume=(at, 0), position=group[-1].n_bytes)
            continue
        for k, block in enumerate(_blocks_of(sources[at], reading)):
            if k >= passed:
                yield replace(block, resume=(at, k + 1))
        at, passed = at + 1, 0


def _small_files(sources: list[Source], at: int, reading: Reading) -> list[Source]:
    """The files from ``at`` on that fit into one block, each of them a document."""
    group: list[Source] = []
    total = 0
    for source in islice(sources, at, None):
        total += source.size
        if total > CHUNK or source.format != "txt" or reading.document != "file" or source.compressed:
            break
        group.append(source)
    return group


def _whole(source: Source) -> bytes:
    with Stream(source.path) as stream:
        return stream.read(2 * CHUNK)


def _blocks_of(source: Source, reading: Reading) -> Iterator[Block]:
    if source.format == "jsonl":
        return _lines(source, "jsonl")
    if source.format == "parquet":
        return _grouped(tables.parquet(source, reading.column), source)
    if source.format in ("csv", "tsv"):
        return _grouped(tables.delimited(source, reading.column, reading.quoting), source)
    if reading.document == "line":
        return _lines(source, "lines")
    return _paragraphs(source) if reading.document == "paragraph" else _pieces(source)


def _lines(source: Source, kind: str) -> Iterator[Block]:
    """Blocks of whole lines. A line beyond MAX_LINE is passed over without being held."""
    origin = f"{source.path} from byte {source.start:,}" if source.start else source.path
    with Stream(source.path, source.start, source.stop) as stream:
        held, line, too_long = b"", 1, ()
        # a long line is read in growing steps, or putting it together would take the square of its length
        while more := stream.read(max(CHUNK, min(len(held), MAX_LINE + 1 - len(held)))):
            held += more
            cut = held.rfind(b"\n") + 1
            if cut:
                yield Block(kind, held[:cut], origin, line, too_long=too_long, position=stream.position)
                line, too_long = line + held.count(b"\n", 0, cut), ()
                held = held[cut:]
            elif len(held) > MAX_LINE:
                too_long += (line,)
                held, line = _after_line_end(stream), line + 1
        if held or too_long:
            yield Block(kind, held, origin, line, too_long=too_long, position=stream.position)


def _after_line_end(stream: Stream) -> bytes:
    """What was read beyond the next line end; nothing at the end of the file."""
    while chunk := stream.read(CHUNK):
        if (end := chunk.find(b"\n")) >= 0:
            return chunk[end + 1 :]
    return b""


def _paragraphs(source: Source) -> Iterator[Block]:
    """Blocks that end at a blank line."""
    with Stream(source.path) as stream:
        held = stream.read(CHUNK)
        while held:
            more = stream.read(max(CHUNK, len(held)))
            cut = len(held)
            if more:
                cut = max(held.rfind(b"\n\n"), held.rfind(b"\n\r\n")) + 1
                if not cut and len(held) > MAX_LINE:
                    cut = _safe_cut(held, 0)
            if cut:
                yield Block("paragraphs", held[:cut], source.path, position=stream.position)
            held = held[cut:] + more


def _pieces(source: Source) -> Iterator[Block]:
    """A text file that is one document, in pieces that end before the white space between two words."""
    with Stream(source.path) as stream:
        held, head = stream.read(CHUNK), b""
        while held:
            more = stream.read(CHUNK)
            cut = _safe_cut(held, CHUNK // 2) if more else len(held)
            if cut:
                piece = held[:cut]
                yield Block("files", [piece], source.path, begins=not head, ends=not more, head=head,
                            position=stream.position)  # fmt: skip
                head = head or piece[:_HEAD]
            held = held[cut:] + more


def _safe_cut(held: bytes, least: int) -> int:
    """Where a piece of a long text may end, beyond ``least``; 0 where more text has to be seen first."""
    for pattern in _SAFE_CUTS if len(held) > _LAST_RESORT else _SAFE_CUTS[:2]:
        for begin in (max(least, len(held) - 4096), least):
            ends = [match.end() for match in pattern.finditer(held, begin)]
            if ends:
                return ends[-1]
    return 0


def _grouped(texts: Iterator[tuple[str | None, int]], source: Source) -> Iterator[Block]:
    """Blocks of the texts of a table, given with the position in the file."""
    group: list[str | None] = []
    size = position = 0
    for text, position in texts:
        group.append(text)
        size += len(text or "") + 1
        if size >= CHUNK:
            yield Block("texts", group, source.path, position=position)
            group, size = [], 0
    if group:
        yield Block("texts", group, source.path, position=position)
