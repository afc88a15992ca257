"""Corpora made in parts and joined, verified and described."""

import shutil
import subprocess
import sys

import pytest
from data_common import COMMAND, PARAGRAPHS, content, documents_of, prepare

from megagpt.data.bpe import parse_training, train
from megagpt.data.indexed import IndexedDataset
from megagpt.data.main import data_main


def test_shards_join_to_the_whole(tmp_path, texts, tokenizer):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--valid_fraction", "0.2")
    assert prepare(*args, "--output", tmp_path / "whole") == 0
    for i in (1, 2, 3):
        assert prepare(*args, "--output", tmp_path / "out", "--shard", f"{i}/3") == 0
    for name in ("out", "out-valid"):
        assert data_main(["merge", "--output", str(tmp_path / name)]) == 0
        assert content(tmp_path / name) == content(tmp_path / name.replace("out", "whole"))
    assert data_main(["verify", str(tmp_path / "out"), str(tmp_path / "out-valid")]) == 0
    joined, whole = (IndexedDataset(tmp_path / name).info for name in ("out", "whole"))
    for name in ("n_words", "n_bytes", "max_id", "tokenizer_sha256", "eot_id", "bin_sha256", "idx_sha256"):
        assert getattr(joined, name) == getattr(whole, name)


def test_a_missing_shard_is_named(tmp_path, texts, tokenizer, capsys):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert prepare(*args, "--shard", "2/2") == 0
    assert data_main(["merge", "--output", str(tmp_path / "out")]) == 2
    assert "out-1-of-2 is missing" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["other settings", "other files"])
def test_a_shard_of_another_job_is_not_joined(tmp_path, texts, tokenizer, change, capsys):
    """A shard left over from before the input changed would silently be mixed with the new ones."""
    args = ["--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out"]
    assert prepare(*args, "--shard", "1/2") == 0
    if change == "other files":
        (tmp_path / "input" / "d.txt").write_text("more")
    else:
        args += ["--json_key", "body"]
    assert prepare(*args, "--shard", "2/2") == 0
    assert data_main(["merge", "--output", str(tmp_path / "out")]) == 2
    assert "out-2-of-2 was made from other files or with other settings" in capsys.readouterr().err
    assert not (tmp_path / "out.bin").exists()


def test_shards_made_from_copies_of_the_input_are_joined(tmp_path, texts, tokenizer, monkeypatch):
    """On two machines, each with its own files, which differ in their times."""
    for i in (1, 2):
        shutil.copytree(tmp_path / "input", tmp_path / f"machine{i}" / "input", copy_function=shutil.copyfile)
        monkeypatch.chdir(tmp_path / f"machine{i}")
        args = ("--input", "input", "--tokenizer", tokenizer, "--output", tmp_path / "out", "--shard", f"{i}/2")
        assert prepare(*args) == 0
    assert data_main(["merge", "--output", str(tmp_path / "out")]) == 0
    assert documents_of(tmp_path / "out") == texts


def test_shards_that_train_their_tokenizer_share_it(tmp_path, texts):
    """Each shard trains it in a process of its own."""
    args = ["--input", str(tmp_path / "input"), "--tokenizer", "train:300:wordend"]
    for i in (1, 2):
        command = [sys.executable, "-c", COMMAND, *args, "--output", str(tmp_path / "out"), "--shard", f"{i}/2"]
        subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)
    assert data_main(["merge", "--output", str(tmp_path / "out")]) == 0
    assert prepare(*args, "--output", tmp_path / "whole") == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_corpora_of_different_tokenizers_are_not_joined(tmp_path, texts, tokenizer, capsys):
    for name, spec in (("a", tokenizer), ("b", "train:450")):
        assert prepare("--input", tmp_path / "input", "--tokenizer", spec, "--output", tmp_path / name) == 0
    prefixes = [str(tmp_path / name) for name in "ab"]
    assert data_main(["merge", *prefixes, "--output", str(tmp_path / "c")]) == 2
    assert "made with different tokenizers" in capsys.readouterr().err
    assert not list(tmp_path.glob("c*"))


@pytest.mark.parametrize("damage", ["flip", "tokenizer", "no tokenizer"])
def test_verify_finds_what_opening_cannot(tmp_path, texts, tokenizer, damage, capsys):
    assert prepare("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    if damage == "flip":
        data = bytearray((tmp_path / "out.bin").read_bytes())
        data[100] ^= 1
        (tmp_path / "out.bin").write_bytes(data)
        message = "is not what was written"
    elif damage == "tokenizer":
        train(PARAGRAPHS, parse_training("train:300")).save(tmp_path / "out.tokenizer.json")
        message = "is another tokenizer"
    else:
        (tmp_path / "out.tokenizer.json").unlink()
        message = "is missing"
    IndexedDataset(tmp_path / "out")
    assert data_main(["verify", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_info_tells_what_a_corpus_is(tmp_path, texts, tokenizer, capsys):
    assert prepare("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    capsys.readouterr()
    assert data_main(["info", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "40" in out
    assert "in uint16" in out
    assert "vocabulary    400" in out
