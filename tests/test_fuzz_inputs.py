"""A few of the random inputs of tests/fuzz.py, the same at every run, and what they found."""

import pytest
from fuzz import TooSlow, in_time, run_hypothesis
from fuzz_targets import TARGETS

from megagpt.errors import DataError


@pytest.mark.parametrize("name", TARGETS)
def test_random_inputs_are_read_or_refused_in_a_line(name, tmp_path):
    target = TARGETS[name](tmp_path)
    assert all(target.check(seed) for seed in target.seeds), "the good inputs are good"
    assert run_hypothesis(target, 60).total() >= 60


def test_a_defect_would_be_noticed(tmp_path, monkeypatch):
    """A reader that trusts a count, one that takes its time, and one that needs endless memory."""
    monkeypatch.setattr("fuzz.SECONDS", 1)
    target = TARGETS["hostlist"](tmp_path)

    def with_reader(read):
        return type(target)(target.seeds, target.words, read)

    with pytest.raises(IndexError):
        run_hypothesis(with_reader(lambda data: data[10_000]), 1)
    with pytest.raises(MemoryError):
        run_hypothesis(with_reader(lambda data: bytes(3 << 30)), 1)

    def endless(data: bytes) -> None:
        while True:
            try:
                while True:
                    pass
            except Exception:
                continue

    with pytest.raises(TooSlow):
        in_time(endless, b"")

    def wordless(data: bytes) -> None:
        raise DataError(" ")

    with pytest.raises(AssertionError, match="an error without a word"):
        run_hypothesis(with_reader(wordless), 1)


def test_a_number_beyond_all_floats_in_hjson_is_refused(tmp_path):
    """Found by atheris: HJSON's reader asks for the whole number that infinity is."""
    for name in ("ds_config", "recipe"):
        (tmp_path / name).mkdir()
        assert not TARGETS[name](tmp_path / name).check(b"{a: 1e999 # more\n}")


def test_a_message_is_a_line_whatever_a_file_puts_into_it(tmp_path):
    """Found by atheris: a column's name with a line end in quotes."""
    assert str(DataError("no column 'a\nb\x1b[2J\udc80'")) == r"no column 'a\nb\x1b[2J\udc80'"
    target = TARGETS["csv"](tmp_path)
    assert not target.check(b'"a\nb",labe\nc,d\n')
