"""One column of a table: CSV, TSV and parquet files as a stream of texts."""

import codecs
import contextlib
import csv
import tempfile
from collections.abc import Iterator
from typing import IO

from megagpt.data.sources import Source
from megagpt.data.storage import storage_errors
from megagpt.data.streams import CHUNK, MAX_LINE, Stream
from megagpt.errors import DataError, nearest


def delimited(source: Source, column: str, quoting: str) -> Iterator[tuple[str | None, int]]:
    """The texts of ``column`` of a CSV or TSV file, each with the bytes consumed so far.

    None stands for a row that is too short or malformed. ``column`` is a name in the header line, or a number from 1 on
    for a file without one. ``quoting``: "standard", "none", or "auto" for standard in CSV and none in TSV, where quotes
    are ordinary characters. Raises DataError.
    """
    quoted = source.format == "csv" if quoting == "auto" else quoting == "standard"
    delimiter = "," if source.format == "csv" else "\t"
    with Stream(source.path) as stream:
        lines = _Lines(stream)
        rows = _quoted(lines, delimiter) if quoted else (line.rstrip("\r\n").split(delimiter) for line in lines)
        index = None
        for row in rows:
            if row == [] or row == [""]:  # a blank line
                continue
            if index is None:
                index, is_header = _column(row or [], column, source.path)
                if is_header:
                    continue
            yield (row[index] if row and index < len(row) else None), stream.position


class _Lines:
    """The lines of a stream, with their ends; bytes that are not UTF-8 become U+FFFD. ``ended``: none is left."""

    def __init__(self, stream: Stream) -> None:
        self.path = stream.path
        self.ended = False
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        held = ""
        while chunk := self._stream.read(CHUNK):
            *lines, held = (held + decoder.decode(chunk)).split("\n")
            if len(held) > MAX_LINE:
                raise DataError(f"{self.path}: a line is longer than {MAX_LINE:,} characters; is this a table of text?")
            yield from (line + "\n" for line in lines)
        if held := held + decoder.decode(b"", final=True):
            yield held
        self.ended = True


def _quoted(lines: _Lines, delimiter: str) -> Iterator[list[str] | None]:
    """Rows whose fields may be in quotes and then span lines; None for a malformed one.

    A quote that nobody closes would swallow the rest of the file as one text: it is an error.
    """
    csv.field_size_limit(MAX_LINE)
    rows = csv.reader(lines, delimiter=delimiter)
    row: list[str] | None = []
    while True:
        begin = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" not in str(error):  # a line end within a field, which only the row suffers from
                yield None
                continue
            row = None
        if row is None or lines.ended:
            raise DataError(
                f"{lines.path}:{begin}: a quote that opens in this row is not closed; correct it, or set --quoting none"
            )
        yield row


def parquet(source: Source, column: str) -> Iterator[tuple[str | None, int]]:
    """The texts of ``column``, None where it holds something else, each with the bytes consumed so far, about."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{source.path} is a parquet file; to read it: pip install pyarrow") from None
    try:
        with _seekable(source) as content, pyarrow.parquet.ParquetFile(content) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(source.path, column, file.schema_arrow.names)
            rows, done = max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                done += batch.num_rows
                for value in batch.column(0).to_pylist():
                    yield (value if isinstance(value, str) else None), source.size * done // rows
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{source.path} cannot be read as parquet: {reason}; get the file again") from None


@contextlib.contextmanager
def _seekable(source: Source) -> Iterator[str | IO[bytes]]:
    """What to open a parquet file by, as its reader goes back and forth: a temporary copy where it is compressed."""
    if not source.compressed:
        yield source.path
        return
    with tempfile.TemporaryFile() as copy:
        with Stream(source.path) as stream, storage_errors(tempfile.gettempdir()):
            while chunk := stream.read(CHUNK):
                copy.write(chunk)
            copy.flush()
        yield copy


def _column(first_row: list[str], column: str, path: str) -> tuple[int, bool]:
    """The index of the wanted column, and whether ``first_row`` is a header."""
    names = [name.strip() for name in first_row]
    if column in names:
        return names.index(column), True
    if column.isdecimal() and 1 <= int(column) <= len(names):
        return int(column) - 1, False
    raise _no_column(path, column, names)


def _no_column(path: str, column: str, names: list[str]) -> DataError:
    shown = ", ".join(name[:40] for name in names[:12]) or "not to be made out"
    return DataError(
        f"{path} has no column {column[:40]!r}{nearest(column, names)}; its columns are {shown}: choose one with "
        "--column, by its number where there is no header line"
    )
