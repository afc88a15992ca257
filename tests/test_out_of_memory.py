"""A rank that gets no more memory, or is killed for it: the job ends at once, and it is told what happened."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpoint_common import arguments
from fork_server import Job, train_main

from megagpt.dist import memory

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_ROOM = 64 << 20


@pytest.fixture
def small_room():
    """A control group of this kernel in which no process gets more than 64 MiB; processes enter by ``cgroup.procs``."""
    is_v1 = (_V1 / "memory.limit_in_bytes").exists()
    group = (_V1 if is_v1 else _V2) / f"megagpt-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of memory can be made here: {error.strerror}")
    try:
        (group / ("memory.limit_in_bytes" if is_v1 else "memory.max")).write_text(str(_ROOM))
        yield group / "cgroup.procs"
    except OSError as error:
        pytest.skip(f"this control group has no limit of memory: {error.strerror}")
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def grow(room: str) -> None:
    """Take memory until the kernel has had enough, inside the control group."""
    Path(room).write_text(str(os.getpid()))
    held = []
    while True:
        held.append(bytearray(b"x") * (1 << 20))


def growing(room, argv):
    """``train.py`` whose rank 1 grows from its third step on, beside the training."""
    from megagpt.train.loop import Loop

    step = Loop._engine_step

    def leaking(self):
        if os.environ["RANK"] == "1" and self.state.step == 2:
            threading.Thread(target=grow, args=[room], daemon=True).start()
        return step(self)

    Loop._engine_step = leaking
    return train_main(argv)


def test_a_rank_that_the_kernel_kills_for_want_of_memory_ends_the_job(small_room, tmp_path):
    argv = [str(word) for word in arguments(tmp_path / "run", max_steps=10**6, save_interval=0)]
    with Job(growing, str(small_room), argv) as job:
        job.processes[1].join(60)
        died = time.monotonic()
        assert job.wait(15) == [4, -signal.SIGKILL], job.output()
        assert time.monotonic() - died < 15
        assert job.output(0).rstrip().endswith("it has killed a process of this host for want of memory")


RANK = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from test_out_of_memory import grow
print("started", flush=True)
if os.environ["RANK"] == "1":
    grow(sys.argv[1])
time.sleep(100)
"""


def test_the_launcher_names_a_rank_that_was_killed_for_want_of_memory(small_room, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [sys.executable, "-m", "megagpt", "launch", "--num_gpus", "2", script, small_room, Path(__file__).parent]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 137
    assert f"rank 1 on {os.uname().nodename} was ended by SIGKILL; meanwhile the kernel has killed" in done.stderr


def limited(argv):
    """``train.py`` whose rank 1 may take a quarter of a gigabyte more than it has when it begins to train."""
    from megagpt.train.loop import Loop

    run = Loop.run

    def with_limit(self):
        if os.environ["RANK"] == "1":
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20),) * 2)
        return run(self)

    Loop.run = with_limit
    return train_main(argv)


def test_a_rank_that_is_refused_memory_tells_what_takes_less(tmp_path):
    """As with ``ulimit -v``: what a layer of 8,192 sequences makes does not fit."""
    config = tmp_path / "ds.json"
    config.write_text('{"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 1}}')
    argv = arguments(tmp_path / "run", ds_config=config, micro_batch_size=8192, max_steps=2)
    with Job(limited, [str(word) for word in argv]) as job:
        assert job.wait(60) == [4, 1], job.output()
        assert f"rank 1 on {os.uname().nodename} failed in the setup of step 1:" in job.output(1)
        assert job.output(1).rstrip().endswith(memory.WAYS_OUT)


def test_errors_that_speak_of_memory_are_known():
    import torch

    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), OSError(12, "Cannot allocate memory")):
        assert memory.was_refused(error)
    for error in (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(28, "No space left on device")):
        assert not memory.was_refused(error)
