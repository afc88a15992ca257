"""No rank outlives its launcher, and ``megagpt launch`` ends as its ranks do, whatever is done to whom."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from fork_server import free_port

from megagpt.cli import main
from megagpt.dist.launch import _devices

# A rank without torch, for speed: it listens, is guarded, and stops when asked to or when its launcher has gone.
RANK = """
import os, sys, time
from megagpt import dist
from megagpt.dist import guard
from megagpt.train.stopping import STOP, listening

guard._PEERS_GRACE = 1.0

def fn():
    dist.watch(5.0, 600.0, int(os.environ["LOCAL_SIZE"]))
    os.write(1, f"pid {os.environ['RANK']} {os.getpid()}\\n".encode())  # print writes in pieces, between others'
    while stop.agree("cpu") != STOP:
        dist.beat("step", 7)
        time.sleep(0.05)
    return 75

with listening() as stop:
    sys.exit(dist.run_main(fn, on_orphan=stop.orphaned))
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "rank.py"
    path.write_text(RANK)
    return path


@contextmanager
def started(command):
    """The launcher, and the pids of its two ranks, which are dead when the context is left."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    pids = {}
    process = subprocess.Popen(
        [str(word) for word in command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while len(pids) < 2:
            line = process.stdout.readline()
            assert line, "the launcher has ended"
            if line.startswith("pid"):
                pids[int(line.split()[1])] = int(line.split()[2])
        yield process, pids
    finally:
        for pid in [process.pid, *pids.values()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_all_end(pids, seconds=15):
    deadline = time.monotonic() + seconds
    while any(map(lives, pids)):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


LAUNCHER, FIRST, LAST = "launcher", 0, 1
CELLS = [
    (LAUNCHER, "KILL", -9),
    (LAUNCHER, "TERM", 75),
    (LAUNCHER, "INT", 130),
    (LAUNCHER, "USR1", 75),
    (LAUNCHER, "USR2", 140),  # not caught unless --exit_signal says so
    (FIRST, "KILL", 137),
    (FIRST, "INT", 130),
    (LAST, "KILL", 137),
    (LAST, "USR2", 140),
    (LAST, "STOP", 137),  # by the launcher, when its peer has given up
]


@pytest.mark.parametrize(("whom", "number", "code"), CELLS, ids=str)
def test_what_is_done_to_whom_ends_all_with_a_true_code(whom, number, code, script):
    with started([sys.executable, "-m", "megagpt", "launch", "--num_gpus", 2, script]) as (process, pids):
        os.kill(process.pid if whom == LAUNCHER else pids[whom], getattr(signal, f"SIG{number}"))
        if number == "STOP":  # stands for a collective in which its peer would wait
            os.kill(pids[0], signal.SIGKILL)
        assert process.wait(timeout=20) == code
        assert_all_end(pids.values())


STOCK = [("outer", "TERM"), ("inner", "KILL")]


def test_ranks_end_with_the_stock_launcher_too(script):
    """Both left ranks that trained on, and the second reported success."""
    command = [Path(sys.executable).parent / "deepspeed", "--num_gpus", 2, "--master_port"]
    with ExitStack() as stack:
        jobs = [stack.enter_context(started([*command, free_port(), script])) for _ in STOCK]
        for (process, pids), (whom, number) in zip(jobs, STOCK, strict=True):
            inner = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(inner if whom == "inner" else process.pid, getattr(signal, f"SIG{number}"))
        for _, pids in jobs:
            assert_all_end(pids.values())


def test_mistakes_are_told_in_a_line(capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,4")
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert _devices(None, None) == ["0", "3", "4"]
    assert _devices(2, None) == ["0", "3"]
    assert _devices(None, "localhost:1,2") == ["1", "2"]
    for words, told in {
        ("--num_gpus", "4", "train.py"): "--num_gpus 4 and this host has 3; lower it",
        ("--num_gpus", "0", "train.py"): "--num_gpus 0 is no number of processes",
        ("--include", "node7:0", "train.py"): "--include node7:0 is to be GPUs of this host",
        ("--num_gpu", "1", "train.py"): "unknown flag --num_gpu (did you mean '--num_gpus'?); megagpt launch --help",
        ("--num_gpus=1", "-x", "1", "train.py"): "unknown flag -x; megagpt launch --help lists the flags",
        ("tain.py", "--num_gpu", "1"): "there is no script tain.py (did you mean 'train.py'?)",
        ("nowhere/train.py",): "there is no script nowhere/train.py; give the path",
        ("--num_gpus", "two", "train.py"): "invalid int value: 'two'; megagpt launch --help lists the flags",
        (): "megagpt launch --help lists the flags",
    }.items():
        assert main(["launch", *words]) == 2
        assert told in capsys.readouterr().err
