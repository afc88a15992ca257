"""Files of examples as rows: CSV, TSV and JSON lines, plain or compressed, with every row that cannot be used counted.

A row is a mapping from column to value. What a column means is the business of ``own_data`` and ``tasks``.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megagpt.data.streams import CHUNK, ENDINGS, MAX_LINE, Stream
from megagpt.errors import DataError, nearest

FORMATS = {".csv": "csv", ".tsv": "tsv", ".txt": "tsv", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}
QUOTING = ("auto", "standard", "none")


class BadRow(Exception):
    """Why a row is no example."""


class EmptyCell(BadRow):
    """A cell that has to hold something does not."""


class Row(NamedTuple):
    place: str  # FILE:LINE
    values: Mapping[str, object]


@dataclass
class Rows:
    """The usable rows of a file, and FILE:LINE: reason for each of the others."""

    path: str
    columns: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def need(self, columns) -> None:
        """Raise DataError unless the file has all of ``columns``."""
        for column in columns:
            if column not in self.columns:
                raise _no_column(self.path, column, self.columns)


def find(folder: Path, name: str) -> Path | None:
    """The file ``name`` in ``folder``, plain or compressed; None if there is none."""
    for candidate in (name, *(name + ending for ending in ENDINGS)):
        if (folder / candidate).is_file():
            return folder / candidate
    return None


def format_of(path: str | os.PathLike) -> str:
    """csv, tsv or jsonl by the name's ending. Raises DataError for another one."""
    name = os.fspath(path).lower()
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    known = FORMATS.get(os.path.splitext(name)[1])
    if known is None:
        raise DataError(f"{path} is neither .csv, .tsv nor .jsonl by its name; rename it to what it holds")
    return known


def read(
    path: str | os.PathLike, *, header: tuple[str, ...] | None = None, wanted: tuple[str, ...] = (), quoting="auto"
) -> Rows:
    """The rows of ``path``. ``header`` names the columns of a table that has no header line.

    A table in which ``wanted`` are numbers and no names has no header line either: its columns are 1, 2, ....
    ``quoting``: "standard", "none", or "auto": standard in CSV, none in TSV, where quotes are ordinary characters.
    Raises DataError for a file that cannot be read, holds nothing, or lacks a wanted column.
    """
    name = os.fspath(path)
    kind = format_of(name)
    if kind == "jsonl":
        found = _json_lines(name)
    else:
        quoted = quoting == "standard" or (quoting == "auto" and kind == "csv")
        found = _table(name, "," if kind == "csv" else "\t", quoted, header, wanted)
    if not found.rows and not found.bad:
        raise DataError(f"{name} has no rows; give a file with examples")
    if found.rows:
        found.need(wanted)
    return found


def content(path: str) -> str:
    """The whole text of a file. Bytes that are not UTF-8 become surrogates, which ``check_text`` refuses."""
    with Stream(path) as stream:
        parts = []
        while part := stream.read(CHUNK):
            parts.append(part)
    data = b"".join(parts)
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} is UTF-16; save it as UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def text(row: Row, column: str) -> str:
    """The text of a cell, without white space around it. Raises BadRow where there is none."""
    value = row.values.get(column)
    if isinstance(value, int | float):
        value = str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise BadRow(f"no {column}" if value is None else f"{column} is not a text")
    return check_text(value, column)


def check_text(value: str, column: str) -> str:
    """``value`` without white space around it. Raises BadRow where it is not proper Unicode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column} is not UTF-8") from None
    return value.strip()


def _table(path: str, delimiter: str, quoted: bool, header, wanted) -> Rows:
    lines = content(path).split("\n")
    records = _quoted(path, lines, delimiter) if quoted else _plain(lines, delimiter)
    first = None
    found = Rows(path, header or ())
    for line, fields in records:
        if first is None:
            first = [name.strip() for name in fields]
            if not header:
                found.columns = _columns(path, first, wanted)
                if found.columns == tuple(first):
                    continue
        if len(fields) == len(found.columns):
            found.rows.append(Row(f"{path}:{line}", dict(zip(found.columns, fields, strict=True))))
        else:
            found.bad.append(f"{path}:{line}: {len(fields)} columns, not {len(found.columns)}")
    return found


def _columns(path: str, first: list[str], wanted) -> tuple[str, ...]:
    numbers = tuple(str(i + 1) for i in range(len(first)))
    if wanted and not set(wanted) <= set(first) and all(column.isdecimal() for column in wanted):
        return numbers
    twice = [name for name in wanted if first.count(name) > 1]
    if twice:
        raise DataError(f"{path} has {first.count(twice[0])} columns {twice[0]!r}; give each its own name")
    return tuple(first)


def _plain(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, 1):
        if line.strip("\r"):
            yield number, line.rstrip("\r").split(delimiter)


def _quoted(path: str, lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows whose fields may be in quotes and then span lines. A quote that nobody closes is an error."""
    csv.field_size_limit(MAX_LINE)
    ended = False

    def feed():
        nonlocal ended
        yield from (line + "\n" for line in lines)
        ended = True

    rows = csv.reader(feed(), delimiter=delimiter)
    while True:
        line = rows.line_num + 1
        try:
            fields = next(rows, None)
        except csv.Error as error:
            raise DataError(f"{path}:{line}: {error}; correct the row, or set --quoting none") from None
        if fields is None:
            return
        if ended:
            raise DataError(
                f"{path}:{line}: a quote that opens in this row is not closed; correct it, or set --quoting none"
            )
        if fields:
            yield line, fields


def _json_lines(path: str) -> Rows:
    found = Rows(path, ())
    columns: dict[str, None] = {}
    for number, line in enumerate(content(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.rows.append(Row(f"{path}:{number}", value))
            columns.update(dict.fromkeys(value))
        else:
            found.bad.append(f"{path}:{number}: not a JSON object")
    found.columns = tuple(columns)
    return found


def _no_column(path: str, column: str, known) -> DataError:
    shown = ", ".join(name[:40] for name in known[:12])
    return DataError(f"{path} has no column {column[:40]!r}{nearest(column, known)}; its columns are {shown}")
