"""Columns of tables: headers, quotes and rows that are not as they should be."""

import pytest
from data_common import COMPRESSIONS, TEXTS, parquet, read

from megagpt.data.documents import Skipped
from megagpt.data.readers import Reading
from megagpt.errors import DataError


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_parquet_gives_its_column(tmp_path, ending):
    (tmp_path / f"all.parquet{ending}").write_bytes(COMPRESSIONS[ending](parquet(TEXTS)))
    assert read([tmp_path / f"all.parquet{ending}"]) == TEXTS


def test_a_column_that_parquet_lacks_is_refused(tmp_path):
    (tmp_path / "all.parquet").write_bytes(parquet(TEXTS))
    with pytest.raises(DataError, match=r"no column 'txt' \(did you mean 'text'\?\); its columns are text"):
        read([tmp_path / "all.parquet"], Reading(column="txt"))


def test_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "all.parquet").write_bytes(parquet(TEXTS)[:-20])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read([tmp_path / "all.parquet"])


def test_quotes_are_ordinary_in_tsv_unless_said_otherwise(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\tan "odd\n2\tquote" here\n')
    assert read([tmp_path / "a.tsv"]) == ['an "odd', 'quote" here']


def test_a_column_without_a_header_has_a_number(tmp_path):
    (tmp_path / "a.tsv").write_text("gj04\t1\t\tOne sentence.\ngj04\t0\t*\tAnother one.\n")
    assert read([tmp_path / "a.tsv"], Reading(column="4")) == ["One sentence.", "Another one."]
    with pytest.raises(DataError, match=r"no column 'text'; its columns are gj04, 1, , One sentence\."):
        read([tmp_path / "a.tsv"])


def test_a_byte_order_mark_is_no_part_of_a_quoted_header(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"text","id"\r\n"one, two","1"\r\n')
    assert read([tmp_path / "a.csv"]) == ["one, two"]


def test_blank_lines_in_a_table_are_passed_over(tmp_path):
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_bytes(b"\n\r\nid,text\r\n\r\n1,one\r\n".replace(b",", delimiter.encode()))
        assert read([tmp_path / name]) == ["one"]


def test_a_line_end_within_a_field_costs_its_row_and_no_other(tmp_path):
    """The csv module stops at a carriage return outside of quotes, and with it a whole job did."""
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,od\rd\n2,two\n")
    (tmp_path / "a.tsv").write_bytes(b"id\ttext\n1\tod\rd\n2\ttwo\n")
    skipped = Skipped()
    assert read([tmp_path / "a.csv"], skipped=skipped) == ["two"]
    assert skipped.counts == {"row without text": 1}
    assert read([tmp_path / "a.tsv"]) == ["od\rd", "two"]


def test_a_quote_that_is_not_closed_is_an_error(tmp_path):
    """Otherwise the rest of the file would be one text."""
    (tmp_path / "a.csv").write_text('id,text\n1,"one\nmore"\n2,"two\n3,three\n4,four\n')
    with pytest.raises(DataError, match=r"a\.csv:4: a quote that opens in this row is not closed"):
        read([tmp_path / "a.csv"])
    assert read([tmp_path / "a.csv"], Reading(quoting="none"))[-1] == "four"


def test_a_row_that_is_too_short_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2\n\n3,three\n")
    skipped = Skipped()
    assert read([tmp_path / "a.csv"], skipped=skipped) == ["one", "three"]
    assert skipped.counts == {"row without text": 1}
