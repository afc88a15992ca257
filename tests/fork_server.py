"""Jobs of several ranks that can be watched, signalled and killed.

Ranks are forked from a server that has torch and DeepSpeed imported: a job of two trains within two or three seconds.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

context = multiprocessing.get_context("forkserver")
# Also what they import when the first engine is built and the last plot drawn: that takes longest of all.
context.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "megagpt.train.main",
        "megagpt.train.run",
        "megagpt.finetune.main",
        "megagpt.finetune.driver",
        "torch._dynamo",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.comm.mori",
        "deepspeed.module_inject.auto_ep_layer",
        "encodings.idna",
        "matplotlib.pyplot",
        "matplotlib.backends.backend_agg",
        "torch.utils.tensorboard",
        "sklearn.metrics",
        "scipy.stats",
        "tyro",
        "tests.fork_warm",
    ]
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_env(rank: int, world_size: int, port: int, folder: str) -> dict[str, str]:
    """The variables torchrun sets, one thread a rank, and nothing shared with other jobs."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": f"{folder}/torch_extensions",
    }


def train_main(argv: list[str]) -> int:
    """``train.py``."""
    from megagpt.train.main import main

    return main(argv)


def finetune_main(argv: list[str]) -> int:
    """``finetune.py``."""
    from megagpt.finetune.main import main

    return main(argv)


def _child(fn, args, env, log):
    os.environ.update({name: value for name, value in env.items() if value is not None})
    for name in (name for name, value in env.items() if value is None):
        os.environ.pop(name, None)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        code = fn(*args) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a failed peer must not keep this one in a collective's destructor


class Job:
    """``fn(*args)`` on ``ranks`` processes at once; what it returns is the process's exit code.

    ``env`` changes the ranks' variables (None removes one) or is a function from the rank to such changes.
    """

    def __init__(self, fn: Callable, *args, ranks: int = 2, env: dict | Callable | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="megagpt-job-"))
        self.port = free_port()
        self.begun = time.monotonic()
        self.processes = []
        for rank in range(ranks):
            changes = env(rank) if callable(env) else env or {}
            variables = {**rank_env(rank, ranks, self.port, str(self.folder)), **changes}
            process = context.Process(target=_child, args=(fn, args, variables, str(self._log(rank))))
            process.start()
            self.processes.append(process)

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"

    def output(self, rank: int | None = None) -> str:
        """What a rank, or one after the other all of them, have printed so far."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join(self._log(r).read_text(errors="replace") for r in ranks if self._log(r).exists())

    def wait_for(self, text: str, *, rank: int | None = None, timeout: float = 120) -> None:
        """Until a rank has printed ``text``; fails when the job ends or the time is up before."""
        deadline = time.monotonic() + timeout
        while text not in self.output(rank):
            alive = any(process.is_alive() for process in self.processes)
            if (not alive and text not in self.output(rank)) or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} was not printed{'' if alive else ' before the end'}:\n{self.output()}")
            time.sleep(0.02)

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to these ranks, or to all without any."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit codes of all ranks, a signal's as its negative number; fails when the time is up before."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            raise AssertionError(f"not all ranks have ended in {timeout:g} s:\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exc_info) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def train(argv: list, ranks: int = 2, env: dict | Callable | None = None) -> Job:
    """``train.py`` with ``argv`` as a :class:`Job`."""
    return Job(train_main, [str(word) for word in argv], ranks=ranks, env=env)


def finetune(argv: list, ranks: int = 2, env: dict | Callable | None = None) -> Job:
    """``finetune.py`` with ``argv`` as a :class:`Job`."""
    return Job(finetune_main, [str(word) for word in argv], ranks=ranks, env=env)
