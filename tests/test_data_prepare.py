"""``megagpt prepare`` and ``megagpt data``: one corpus on any machine after any interruption, or one clear error."""

import errno
import fcntl
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_data_tokenizer import PARAGRAPHS

from megagpt.data import job, writer
from megagpt.data.bpe import parse_training, train
from megagpt.data.indexed import IndexedDataset
from megagpt.data.main import data_main, prepare_main
from megagpt.data.stdlib_corpus import files
from megagpt.data.storage import storage_errors, write_atomically
from megagpt.data.tokenizer import from_file
from megagpt.errors import StorageError

NEEDS_PROC = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="children are found in /proc")
ENDINGS = (".bin", ".idx", ".json", ".tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small tokenizer that is not trained anew in every test."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(PARAGRAPHS * 20, parse_training("train:400")).save(path)
    return path


@pytest.fixture
def texts(tmp_path):
    """Forty documents in three files, on of them compressed; the documents."""
    documents = [f"Document {i} says: {PARAGRAPHS[i % 3] * (i % 7 + 1)}" for i in range(40)]
    folder = tmp_path / "input"
    folder.mkdir()
    lines = [json.dumps({"text": document, "body": "x"}).encode() + b"\n" for document in documents]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:15]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[15:20])))
    (folder / "c.jsonl").write_bytes(b"".join(lines[20:]))
    return documents


def prepare(*args) -> int:
    return prepare_main([str(arg) for arg in args])


def documents_of(prefix) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), from_file(f"{prefix}.tokenizer.json")
    ids = [dataset.document(i) for i in range(len(dataset))]
    assert all(document[-1] == tokenizer.eot_id for document in ids)
    return [tokenizer.decode(document[:-1]) for document in ids]


def content(prefix) -> list[bytes]:
    return [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")]


def test_a_corpus_holds_every_document_with_its_counts(tmp_path, texts, tokenizer, capsys):
    assert prepare("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    assert documents_of(tmp_path / "out") == texts
    info = IndexedDataset(tmp_path / "out").info
    assert info.n_words == sum(len(text.encode().split()) for text in texts)
    assert info.n_bytes == sum(len(text.encode()) for text in texts)
    assert info.tokenizer_sha256 == from_file(tokenizer).sha256
    assert "40 documents" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"input", *(f"out{ending}" for ending in ENDINGS)}
    assert data_main(["verify", str(tmp_path / "out")]) == 0


def test_the_number_of_processes_changes_nothing(tmp_path, texts, tokenizer):
    for workers in (1, 3):
        args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--workers", workers)
        assert prepare(*args, "--output", tmp_path / f"out{workers}") == 0
    assert content(tmp_path / "out1") == content(tmp_path / "out3")


def test_a_tokenizer_is_trained_on_the_input_when_asked_for(tmp_path, texts):
    assert prepare("--input", tmp_path / "input", "--tokenizer", "train:500", "--output", tmp_path / "out") == 0
    assert documents_of(tmp_path / "out") == texts
    assert IndexedDataset(tmp_path / "out").info.vocab_size > 300


def test_equal_documents_are_on_one_side_of_the_validation_split(tmp_path, tokenizer):
    documents = [f"Number {i % 50}." for i in range(100)]
    (tmp_path / "a.txt").write_text("\n".join(documents))
    args = ("--input", tmp_path / "a.txt", "--document", "line", "--tokenizer", tokenizer, "--valid_fraction", "0.3")
    assert prepare(*args, "--output", tmp_path / "out") == 0
    train_side, valid_side = documents_of(tmp_path / "out"), documents_of(tmp_path / "out-valid")
    assert sorted(train_side + valid_side) == sorted(documents)
    assert not set(train_side) & set(valid_side)
    assert 15 <= len(valid_side) <= 45


def test_a_long_file_is_one_document_on_one_side(tmp_path, tokenizer):
    """It is tokenised in pieces of a megabyte; their ids are those of the whole."""
    text = "".join(f"Line {i} of a long text, with words and numbers {i * i}.\n" for i in range(30_000))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "other.txt").write_text("Another document.")
    assert prepare("--input", tmp_path, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 2) == 0
    assert documents_of(tmp_path / "out") == [text, "Another document."]
    ids = IndexedDataset(tmp_path / "out").document(0)
    assert ids.tolist() == [*from_file(tokenizer).encode(text), 0]


def test_the_standard_library_is_the_embedded_corpus(tmp_path, tokenizer, capsys):
    assert prepare("--corpus", "python-stdlib", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    modules = [Path(path) for path in files()]
    dataset = IndexedDataset(tmp_path / "out")
    assert len(dataset) == len([path for path in modules if path.read_bytes().strip()])
    assert from_file(tokenizer).decode(dataset.document(0)[:-1]) == modules[0].read_text()
    assert not {"site-packages", "test", "tests"} & {part for path in modules for part in path.parts}
    assert Path(json.__file__) in modules


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


def test_the_same_command_twice_does_the_work_once(tmp_path, texts, tokenizer, capsys):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert prepare(*args) == 0
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert prepare(*args) == 0
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().out


def test_another_corpus_is_replaced_only_when_told_so(tmp_path, texts, tokenizer, capsys):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert prepare(*args) == 0
    before = content(tmp_path / "out")
    assert prepare(*args, "--json_key", "body") == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert content(tmp_path / "out") == before
    assert prepare(*args, "--json_key", "body", "--overwrite") == 0
    assert documents_of(tmp_path / "out") == ["x"] * 40


def test_a_validation_set_of_the_users_own_is_not_replaced(tmp_path, texts, tokenizer, capsys):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer)
    assert prepare(*args, "--output", tmp_path / "out-valid") == 0
    before = content(tmp_path / "out-valid")
    assert prepare(*args, "--output", tmp_path / "out", "--valid_fraction", "0.2") == 2
    assert re.search(r"out-valid\.bin exists and is not what .* --overwrite replaces it", capsys.readouterr().err)
    assert content(tmp_path / "out-valid") == before
    assert not (tmp_path / "out.bin").exists()


def test_a_corpus_that_was_damaged_is_not_up_to_date(tmp_path, texts, tokenizer):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert prepare(*args) == 0
    before = content(tmp_path / "out")
    os.truncate(tmp_path / "out.bin", 100)
    assert prepare(*args) == 2
    assert prepare(*args, "--overwrite") == 0
    assert content(tmp_path / "out") == before


def test_gpt1_cleaning_and_shuffling_are_done_when_asked_for(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One — two.  Three!! Four. Five. Six. Seven. Eight.\n\nNine")
    args = ("--input", tmp_path / "a.txt", "--tokenizer", tokenizer)
    assert prepare(*args, "--clean", "gpt1", "--output", tmp_path / "clean") == 0
    assert documents_of(tmp_path / "clean") == ["One - two. Three !! Four. Five. Six. Seven. Eight. \n Nine"]
    assert prepare(*args, "--shuffle_sentences", "--output", tmp_path / "mixed") == 0
    assert sorted(documents_of(tmp_path / "mixed")[0].split()) == sorted((tmp_path / "a.txt").read_text().split())
    assert IndexedDataset(tmp_path / "clean").info.n_bytes == (tmp_path / "a.txt").stat().st_size


COMMAND = "import sys; from megagpt.data.main import prepare_main; sys.exit(prepare_main(sys.argv[1:]))"


@pytest.fixture
def many(tmp_path):
    """Some five megabytes in a plain and a compressed file, which take a few seconds."""
    lines = [json.dumps({"text": f"{i} {PARAGRAPHS[i % 3]}"}).encode() + b"\n" for i in range(30_000)]
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:15_000]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[15_000:]), 1))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


def test_a_killed_job_goes_on_where_it_stopped(tmp_path, many, tokenizer, monkeypatch, capsys):
    args = ["--input", *many, "--tokenizer", str(tokenizer), "--valid_fraction", "0.1", "--workers", "2"]
    assert prepare(*args, "--output", tmp_path / "whole") == 0
    save_often = "import megagpt.data.job as job; job._SAVE_EVERY_S = 0.05; "
    script = tmp_path / "prepare.py"  # spawned processes import their parent's script
    script.write_text(f"{save_often}\nif __name__ == '__main__':\n    {COMMAND}\n")
    command = [sys.executable, str(script), *args, "--output", str(tmp_path / "killed")]
    state, kills, last = tmp_path / "killed.preparing" / "state.json", 0, None
    while kills < 3:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 60:
            recorded = state.read_bytes() if state.exists() else None
            if recorded not in (None, last):  # it has got further than the run before
                process.send_signal(signal.SIGKILL)
                last, kills = recorded, kills + 1
            time.sleep(0.02)
        if process.wait() == 0:
            break
        assert not (tmp_path / "killed.bin").exists()
    assert kills, "the job was faster than its first record"
    capsys.readouterr()
    assert prepare(*args, "--output", tmp_path / "killed") == 0
    for name in ("", "-valid"):
        assert content(f"{tmp_path}/killed{name}") == content(f"{tmp_path}/whole{name}")
        assert (
            IndexedDataset(f"{tmp_path}/killed{name}").info.n_words
            == IndexedDataset(f"{tmp_path}/whole{name}").info.n_words
        )
    assert not (tmp_path / "killed.preparing").exists()


@NEEDS_PROC
def test_workers_end_with_the_process_that_started_them(tmp_path, many, tokenizer):
    script = tmp_path / "prepare.py"
    script.write_text(f"if __name__ == '__main__':\n    {COMMAND}\n")
    args = ["--input", *many, "--tokenizer", str(tokenizer), "--workers", "2", "--output", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, str(script), *args], stdout=subprocess.DEVNULL)
    children: list[str] = []
    while len(children) < 3 and process.poll() is None:  # two workers and multiprocessing's own helper
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(child) for child in children)


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@NEEDS_PROC
def test_a_killed_worker_is_reported_and_its_work_not_lost(tmp_path, many, tokenizer):
    script = tmp_path / "prepare.py"
    script.write_text(f"if __name__ == '__main__':\n    {COMMAND}\n")
    args = ["--input", *many, "--tokenizer", str(tokenizer), "--workers", "2", "--output", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, str(script), *args], stderr=subprocess.PIPE, text=True)
    children: list[str] = []
    while len(children) < 3 and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.02)
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process was killed" in errors
    assert "Traceback" not in errors
    assert prepare(*args) == 0


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
        "empty": "all of them empty",
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
        "bad choice": "'page' for argument '--document'",
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


def test_a_file_system_without_locks_will_do(tmp_path, texts, tokenizer, monkeypatch, capsys):
    """As Lustre is often mounted."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert prepare("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    assert "has no locks" in capsys.readouterr().out


def test_two_jobs_do_not_write_one_corpus(tmp_path, many, tokenizer, capsys):
    (tmp_path / "out.preparing").mkdir()
    with open(tmp_path / "out.preparing" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare("--input", *many, "--tokenizer", tokenizer, "--output", tmp_path / "out") == 2
    assert "another process is at work in" in capsys.readouterr().err
    assert (tmp_path / "out.preparing" / "lock").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_full_disk_is_called_a_full_disk():
    with (
        pytest.raises(StorageError, match="no space left on the disk"),
        storage_errors("/dev/full"),
        open("/dev/full", "wb", 0) as full,
    ):
        full.write(b"x")


def test_a_disk_that_fills_up_leaves_no_corpus_and_can_be_gone_on_from(tmp_path, many, tokenizer):
    """A limit on the size of files stands for the disk's: writes beyond it fail in the same way."""
    script = tmp_path / "prepare.py"
    script.write_text(f"if __name__ == '__main__':\n    {COMMAND}\n")
    args = ["--input", *many, "--tokenizer", str(tokenizer), "--workers", "1", "--output", str(tmp_path / "out")]
    limited = ["bash", "-c", 'ulimit -f 512; exec "$@"', "bash", sys.executable, str(script), *args]
    out = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert out.returncode == 7, out.stderr
    assert "cannot write" in out.stderr
    assert "File too large" in out.stderr
    assert "Traceback" not in out.stderr
    assert not list(tmp_path.glob("out*"))  # nothing was recorded yet: the space is given back
    assert prepare(*args) == 0


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@NEEDS_PROC
def test_memory_does_not_grow_with_the_input(tmp_path, tokenizer):
    """Peak memory of the whole job on 30 MB is within a small amount of that on 6 MB."""
    line = json.dumps({"text": PARAGRAPHS[0] * 10}).encode() + b"\n"
    measure = (
        "import re, resource, sys; from megagpt.data.main import prepare_main\nif __name__ == '__main__':\n"
        "    prepare_main(sys.argv[1:])\n"
        "    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "    # getrusage would give the peak of the process that started this one\n"
        "    own = int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        "    print('peaks', own, workers)\n"
    )
    script = tmp_path / "prepare.py"
    script.write_text(measure)
    peaks = []
    for n_bytes in (6_000_000, 30_000_000):
        (tmp_path / "in.jsonl").write_bytes(line * (n_bytes // len(line)))
        args = ["--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer, "--workers", "2", "--overwrite"]
        command = [sys.executable, str(script), *map(str, args), "--output", str(tmp_path / "out")]
        out = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
        peaks.append([int(kilobytes) / 1024 for kilobytes in out.rsplit("peaks ", 1)[1].split()])
    assert all(large < small + 16 for small, large in zip(*peaks, strict=True)), peaks


@pytest.mark.skipif("MEGAGPT_DATA" not in os.environ, reason="set MEGAGPT_DATA to the folder of the reference data")
def test_real_books_get_the_ids_of_the_library(tmp_path):
    import lzma

    data = Path(os.environ["MEGAGPT_DATA"])
    source, vocabulary = data / "books" / "books-valid.jsonl.xz", data / "gpt2_bpe" / "gpt2.json"
    assert prepare("--input", source, "--tokenizer", vocabulary, "--output", tmp_path / "out") == 0
    dataset = IndexedDataset(tmp_path / "out")
    with lzma.open(source) as lines:
        books = [json.loads(line)["text"] for line in lines]
    assert len(books) == len(dataset) == 23
    library = from_file(vocabulary)
    for i in (0, 11, 22):
        assert np.array_equal(dataset.document(i), [*library.encode(books[i]), 50_256])
    assert dataset.info.n_words == 1_521_912
    assert dataset.info.n_bytes == sum(len(book.encode()) for book in books)


@pytest.mark.parametrize("when", ["after the last block", "while the files got their names"])
def test_a_job_killed_at_its_very_end_is_finished(tmp_path, texts, tokenizer, when, monkeypatch):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--valid_fraction", "0.3")
    assert prepare(*args, "--output", tmp_path / "whole") == 0

    class Killed(BaseException):
        """As sudden as a signal: no handler of the job's own sees it."""

    def die(*_):
        raise Killed

    monkeypatch.setattr(job, "_SAVE_EVERY_S", 0)
    place = (job.CorpusWriter, "seal") if when == "after the last block" else (writer, "sync_folder")
    with monkeypatch.context() as patch:
        patch.setattr(*place, die)
        with pytest.raises(Killed):
            prepare(*args, "--output", tmp_path / "out")
    assert (tmp_path / "out.preparing").exists()
    assert prepare(*args, "--output", tmp_path / "out") == 0
    for name in ("", "-valid"):
        assert content(f"{tmp_path}/out{name}") == content(f"{tmp_path}/whole{name}")
        assert data_main(["verify", f"{tmp_path}/out{name}"]) == 0
    assert not (tmp_path / "out.preparing").exists()
