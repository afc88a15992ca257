"""The embedded task: docstrings and the packages they belong to."""

import json
from collections import Counter

import pytest

from megagpt.data.docstrings import MAX_CHARS, MIN_WORDS, N_CLASSES, Docstring, collect, split, write_task


@pytest.fixture(scope="module")
def docstrings():
    return collect()


def test_each_text_stands_once_and_says_something(docstrings):
    texts = [d.text for d in docstrings]
    assert len(set(texts)) == len(texts) > 1000
    assert all(len(text.split()) >= MIN_WORDS and len(text) <= MAX_CHARS for text in texts)
    assert len({d.package for d in docstrings}) == N_CLASSES
    assert all(d.module.startswith(d.package + "/") for d in docstrings)


def test_training_and_validation_share_no_module_and_have_all_packages(docstrings):
    train, valid = split(docstrings)
    assert sorted(train + valid) == sorted(docstrings)
    assert not {d.module for d in train} & {d.module for d in valid}
    assert {d.package for d in train} == {d.package for d in valid}
    assert 0.08 < len(valid) / len(docstrings) < 0.25


def test_whole_modules_are_held_out_until_they_make_a_fifth():
    sizes = {"p/a.py": 30, "p/b.py": 4, "p/c.py": 4, "p/d.py": 2, "q/a.py": 5, "q/b.py": 6}
    found = [Docstring(f"{m} {i}", m[0], m) for m, n in sizes.items() for i in range(n)]
    valid = Counter(d.module for d in split(found)[1])
    # at most eight of p's 40: the smallest module and one of four; the smaller one of q's two, though it is more
    assert valid in ({"p/d.py": 2, "p/b.py": 4, "q/a.py": 5}, {"p/d.py": 2, "p/c.py": 4, "q/a.py": 5})
    assert valid == {d.module: sizes[d.module] for d in split(found)[1]}


def test_the_files_are_rows_of_text_label_and_module(tmp_path):
    sizes = write_task(tmp_path / "task")
    for name, n in sizes.items():
        rows = [json.loads(line) for line in (tmp_path / f"task/{name}.jsonl").read_text().splitlines()]
        assert len(rows) == n
        assert set(rows[0]) == {"text", "label", "module"}
