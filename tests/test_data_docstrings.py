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
    found = [
        Docstring(f"{m}{i}", "p", f"p/{m}.py") for m, n in (("a", 5), ("b", 1), ("c", 1), ("d", 3)) for i in range(n)
    ]
    train, valid = split(found)
    # ascending: one of b and c, the other one, d, a; every other module is a candidate: a small one, then d, too large
    assert len({d.module for d in valid}) == 1
    assert Counter(d.module for d in train)["p/a.py"] == 5
    assert len(valid) == 1


def test_the_files_are_rows_of_text_label_and_module(tmp_path):
    sizes = write_task(tmp_path / "task")
    for name, n in sizes.items():
        rows = [json.loads(line) for line in (tmp_path / f"task/{name}.jsonl").read_text().splitlines()]
        assert len(rows) == n
        assert set(rows[0]) == {"text", "label", "module"}
