"""What ``megagpt prepare`` cannot use: one clear error, exit code 2 and nothing left behind; bad lines are counted."""

import os
import re
from pathlib import Path

import pytest
from data_common import documents_of, prepare

from megagpt.data import job


def bad_input(tmp_path: Path, name: str) -> list[str]:
    """The flags of a command that has to be refused, its files made in ``tmp_path``."""
    path = tmp_path / "in.jsonl"
    content = {
        "missing": None,
        "empty": b"",
        "blank": b"\n \n\n",
        "all bad": b"not json\n{cut\n",
        "no key": b'{"content": "x"}\n{"content": "y"}\n',
        "no texts": b'{"text": ""}\n{"text": null}\n',
        "too many bad": b'{"text": "good"}\nbad\nbad\n',
        "output in a new folder": b"bad\n",
    }.get(name, b'{"text": "good"}\n')
    if content is not None:
        path.write_bytes(content)
    extra = {
        "unknown tokenizer": ["--tokenizer", "gpt5"],
        "tokenizer that is none": ["--tokenizer", str(path)],
        "bad training": ["--tokenizer", "train:12"],
        "no validation": ["--valid_fraction", "0.000001"],
        "bad fraction": ["--valid_fraction", "1.5"],
        "bad shard": ["--shard", "5/4"],
        "too many bad": ["--max_bad_lines", "1"],
        "unknown flag": ["--tokeniser", "gpt2"],
        "unknown corpus": ["--corpus", "python-stdlb"],
        "both": ["--corpus", "python-stdlib"],
        "bad choice": ["--document", "page"],
        "a folder as output": ["--output", f"{tmp_path}/"],
        "a file as output": ["--output", f"{tmp_path}/out.bin"],
        "output in a new folder": ["--output", f"{tmp_path}/new/folder/out"],
    }.get(name, [])
    source = [] if name == "unknown corpus" else ["--input", str(path)]
    return [*source, *extra]


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "missing": "no such file or folder",
        "empty": "(the file is|all of them) empty",
        "blank": "no documents: the files hold nothing but white space",
        "all bad": r"no documents: 2 bad JSON; the first: .*in\.jsonl:1: bad JSON",
        "no key": "there is no key 'text', the keys are content: choose one with --json_key",
        "no texts": "no documents: 1 empty, 1 text is not a string|no documents: 1 text is not a string, 1 empty",
        "too many bad": "more than --max_bad_lines 1",
        "unknown tokenizer": "'gpt5' is neither a file nor known",
        "tokenizer that is none": "not a tokenizer.json",
        "bad training": "takes a vocabulary of 257 to",
        "no validation": "of 1 documents none is for validation",
        "bad fraction": "--valid_fraction 1.5 is not",
        "bad shard": "--shard 5/4: it takes i/n",
        "unknown flag": r"--tokeniser \(did you mean '--tokenizer'\?\)",
        "unknown corpus": r"did you mean 'python-stdlib'",
        "both": "give one of them",
        "bad choice": "--document 'page' is unknown; choose one of file, paragraph, line",
        "a folder as output": "names no files; give a prefix",
        "a file as output": "leave the ending away",
        "output in a new folder": "no documents: 1 bad JSON",
    }.items(),
)
def test_bad_input_is_one_clear_error_and_leaves_nothing_behind(tmp_path, tokenizer, name, message, capfd):
    args = bad_input(tmp_path, name)
    if "--tokenizer" not in args:
        args += ["--tokenizer", str(tokenizer)]
    if "--output" not in args:
        args += ["--output", str(tmp_path / "out")]
    before = set(tmp_path.rglob("*"))
    assert prepare(*args) == 2
    errors = capfd.readouterr().err
    assert re.search(message, errors), errors
    assert errors.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_one_document_is_not_split_and_that_is_told_before_it_is_read(tmp_path, monkeypatch, capsys):
    """A book of its own is what many begin with: all of it was tokenised first."""
    (tmp_path / "book.txt").write_text("one\n\ntwo\n\nthree\n" * 9)
    args = ("--input", tmp_path / "book.txt", "--tokenizer", "train:300", "--output", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(job.Job, "run", None)
        assert prepare(*args, "--valid_fraction", "0.3") == 2
    assert "book.txt is one document" in capsys.readouterr().err
    assert prepare(*args, "--valid_fraction", "0.3", "--document", "paragraph") == 0


def test_a_text_too_small_for_the_vocabulary_asked_for_is_told(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("one two three")
    assert prepare("--input", tmp_path, "--tokenizer", "train:3000", "--output", tmp_path / "out") == 0
    assert re.search(r"no more than 2\d\d tokens, of the 3,000 asked for", capsys.readouterr().out)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_the_library_refuses_is_named(tmp_path, texts, workers, capfd):
    """Only the workers load it; what they raise was taken for the death of a worker."""
    (tmp_path / "bad.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}, "pre_tokenizer": [1]}')
    args = ("--input", tmp_path / "input", "--workers", workers, "--output", tmp_path / "out")
    assert prepare(*args, "--tokenizer", tmp_path / "bad.json") == 2
    errors = capfd.readouterr().err
    assert errors.startswith(f"error: {tmp_path}/bad.json: the tokenizer failed")
    assert errors.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_bad_lines_are_reported_with_the_rest_kept(tmp_path, tokenizer, capsys):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\nbad\n{"text": "fine"}\n{"txt": 1}\n')
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    assert documents_of(tmp_path / "out") == ["good", "fine"]
    out = capsys.readouterr().out
    assert "skipped: 1 bad JSON" in out
    assert "skipped: 1 key not found" in out
    assert f"{tmp_path}/in.jsonl:2: bad JSON" in out


def test_training_a_tokenizer_on_nothing_says_why(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(b"bad\nbad\n")
    assert prepare("--input", tmp_path / "in.jsonl", "--tokenizer", "train:300", "--output", tmp_path / "out") == 2
    assert "no documents: 2 bad JSON" in capsys.readouterr().err
    assert not (tmp_path / "out.preparing").exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path, texts, tokenizer, capsys):
    (tmp_path / "file").write_text("")
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer)
    assert prepare(*args, "--output", tmp_path / "file" / "out") == 7
    assert "is a file, not a folder" in capsys.readouterr().err
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert prepare(*args, "--output", tmp_path / "closed" / "out") == 7
        assert "no permission" in capsys.readouterr().err
