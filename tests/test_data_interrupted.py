"""Making a corpus is killed, runs out of disk or meets another job: nothing half-written, and nothing lost."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_common import COMMAND, NEEDS_PROC, PARAGRAPHS, content, prepare

from megagpt.data import job, writer
from megagpt.data.indexed import IndexedDataset
from megagpt.data.main import data_main
from megagpt.data.storage import check_writable, storage_errors, write_atomically
from megagpt.errors import StorageError
from megagpt.evaluate.main import generate_main
from megagpt.evaluate.measure import evaluate_main
from megagpt.zeroshot.main import zeroshot_main


def test_a_killed_job_goes_on_where_it_stopped(tmp_path, many, tokenizer, capsys):
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


@pytest.mark.parametrize("when", ["after the last block", "while the files got their names"])
def test_a_job_killed_at_its_very_end_is_finished(tmp_path, texts, tokenizer, when, monkeypatch):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--valid_fraction", "0.3")
    assert prepare(*args, "--output", tmp_path / "whole") == 0

    class Killed(BaseException):
        """As sudden as a signal: no handler of the job's own sees it."""

    def die(*_):
        raise Killed

    monkeypatch.setattr(job, "_SAVE_EVERY_S", 0)
    place = (job.CorpusWriter, "seal") if when == "after the last block" else (writer, "sync_path")
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


def test_two_jobs_do_not_write_one_corpus(tmp_path, many, tokenizer, capsys):
    (tmp_path / "out.preparing").mkdir()
    with open(tmp_path / "out.preparing" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare("--input", *many, "--tokenizer", tokenizer, "--output", tmp_path / "out") == 2
    assert "another process is at work in" in capsys.readouterr().err
    assert (tmp_path / "out.preparing" / "lock").exists()


def test_a_file_system_without_locks_will_do(tmp_path, texts, tokenizer, monkeypatch, capsys):
    """As Lustre is often mounted."""

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert prepare("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    assert "has no locks" in capsys.readouterr().out


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


def test_what_cannot_be_written_is_told_before_it_is_computed(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new")
    for path, reason in {
        "missing/a.json": "its folder does not exist",
        "file/a.json": "a part of the path is a file",
        ".": "it is a folder",
    }.items():
        with pytest.raises(StorageError, match=f"cannot write .*: {reason}"):
            check_writable(tmp_path / path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"kept")]


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (generate_main, ["--from", "nowhere", "--prompts", "p.jsonl", "--output"]),
        (evaluate_main, ["--from", "nowhere", "--data", "x", "--json"]),
        (zeroshot_main, ["--from", "nowhere", "--task_data", "t", "--json"]),
    ],
)
def test_commands_look_at_their_output_first(tmp_path, command, flags):
    with pytest.raises(StorageError, match="its folder does not exist"):
        command([*flags, str(tmp_path / "missing" / "out.json")])


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, 123)
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
