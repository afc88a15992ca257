"""One column of a table: CSV, TSV and parquet files as a stream of texts."""

import codecs
import csv
from collections.abc import Iterator

from megagpt.data.sources import Source
from megagpt.data.streams import CHUNK, MAX_LINE, Stream
from megagpt.errors import DataError, nearest


def delimited(source: Source, column: str, quoting: str) -> Iterator[tuple[str | None, int]]:
    """The texts of ``column`` of a CSV or TSV file, None where a row is too short, each with the bytes consumed so far.

    ``column`` is a name in the header line, or a number from 1 on for a file without one. ``quoting``: "standard",
    "none", or "auto" for standard in CSV and none in TSV, where quotes are ordinary characters. Raises DataError.
    """
    quoted = source.format == "csv" if quoting == "auto" else quoting == "standard"
    csv.field_size_limit(MAX_LINE)
    with Stream(source.path) as stream:
        rows = csv.reader(
            _decoded_lines(stream),
            delimiter="," if source.format == "csv" else "\t",
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        index = None
        try:
            for row in rows:
                if index is None:
                    index, is_header = _column(row, column, source.path)
                    if is_header:
                        continue
                if row:
                    yield (row[index] if index < len(row) else None), stream.position
        except csv.Error as error:
            raise DataError(f"{source.path}:{rows.line_num}: {error}; set --quoting to none or standard") from None


def parquet(source: Source, column: str) -> Iterator[tuple[str | None, int]]:
    """The texts of ``column``, None where it holds something else, each with the bytes consumed so far, about."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{source.path} is a parquet file; to read it: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
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


def _column(first_row: list[str], column: str, path: str) -> tuple[int, bool]:
    """The index of the wanted column, and whether ``first_row`` is a header."""
    names = [name.strip().removeprefix("\ufeff") for name in first_row]
    if column in names:
        return names.index(column), True
    if column.isdecimal() and 1 <= int(column) <= len(names):
        return int(column) - 1, False
    raise _no_column(path, column, names)


def _no_column(path: str, column: str, names: list[str]) -> DataError:
    shown = ", ".join(name[:40] for name in names[:12])
    return DataError(
        f"{path} has no column {column[:40]!r}{nearest(column, names)}; its columns are {shown}: choose one with "
        "--column, by its number where there is no header line"
    )


def _decoded_lines(stream: Stream) -> Iterator[str]:
    """Lines with their ends; bytes that are not UTF-8 become U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    held = ""
    while chunk := stream.read(CHUNK):
        *lines, held = (held + decoder.decode(chunk)).split("\n")
        if len(held) > MAX_LINE:
            raise DataError(f"{stream.path}: a line is longer than {MAX_LINE:,} characters; is this a table of text?")
        yield from (line + "\n" for line in lines)
    if held := held + decoder.decode(b"", final=True):
        yield held
