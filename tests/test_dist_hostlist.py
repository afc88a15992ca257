"""Slurm's compressed lists against a plain reference that builds them and their expansion side by side."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.dist import expand_hostlist, expand_tasks
from megagpt.errors import ConfigError

letters = st.text("abcxyz-.", min_size=1, max_size=4)


@st.composite
def bracket(draw):
    """A bracket and the numbers in it, written one by one."""
    texts, numbers = [], []
    for _ in range(draw(st.integers(1, 3))):
        first, length, width = draw(st.integers(0, 120)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
        written = [str(n).zfill(width) for n in range(first, first + length)]
        texts.append(written[0] if length == 1 and draw(st.booleans()) else f"{written[0]}-{written[-1]}")
        numbers.extend(written)
    return f"[{','.join(texts)}]", numbers


@st.composite
def hosts(draw):
    """One item of a list: a plain name, or a name with one or two brackets and perhaps a suffix."""
    text = draw(letters)
    names = [text]
    for _ in range(draw(st.integers(0, 2))):
        inside, numbers = draw(bracket())
        after = draw(letters | st.just(""))
        text += inside + after
        names = [f"{name}{number}{after}" for name in names for number in numbers]
    return text, names


@given(st.lists(hosts(), min_size=1, max_size=4))
def test_expansion_equals_the_names_written_out(items):
    text = ",".join(text for text, _ in items)
    assert expand_hostlist(text) == [name for _, names in items for name in names]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,07]", ["n1", "n2", "n3", "n07"]),
        ("n[08-10],login", ["n08", "n09", "n10", "login"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
        ("n[9-10]", ["n9", "n10"]),
    ],
)
def test_worked_examples(text, names):
    assert expand_hostlist(text) == names


@pytest.mark.parametrize(
    "text", ["", ",", "n1,,n2", "n[", "n]", "n[]", "n[1-]", "n[3-1]", "n[a]", "n[[1]]", "n[1,]", "n 1", "n[0-9999999]"]
)
def test_what_slurm_never_writes_is_refused(text):
    with pytest.raises(ConfigError):
        expand_hostlist(text)


def test_a_short_text_cannot_ask_for_endless_names():
    with pytest.raises(ConfigError, match="more than 1,000,000 hosts"):
        expand_hostlist("n" + "[0-999]" * 3)
    with pytest.raises(ConfigError, match="more than 1,000,000 nodes"):
        expand_tasks("1(x9999999)")


@given(st.text("n1[]-,0 9", max_size=20) | st.text(max_size=20))
def test_any_text_is_expanded_or_refused(text):
    with suppress(ConfigError):
        assert all(expand_hostlist(text))
    with suppress(ConfigError):
        assert all(count >= 0 for count in expand_tasks(text))


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9)), min_size=1, max_size=5))
def test_tasks_a_node_equal_the_numbers_written_out(groups):
    text = ",".join(f"{tasks}(x{nodes})" if nodes > 1 else str(tasks) for tasks, nodes in groups)
    assert expand_tasks(text) == [tasks for tasks, nodes in groups for _ in range(nodes)]
