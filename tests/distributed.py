"""Running a function on several ranks: real processes, gloo on 127.0.0.1, a private folder and port, and a timeout.

Processes are forked from a server that has torch and DeepSpeed imported, so that a two-rank job starts in a second.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from fork_server import context as _context
from fork_server import finetune_main, free_port, rank_env, train_main

__all__ = ["RankFailed", "finetune", "free_port", "rank_env", "run_ranks", "train", "train_main"]


def _child(pipe, fn, args, env, log):
    os.environ.update(env)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("ok", fn(*args)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a failed peer must not keep this one in a collective's destructor


class RankFailed(AssertionError):
    """A rank raised, died or ran out of time; the message has its traceback and its output."""


def run_ranks(fn, world_size: int, *args, timeout: float = 120, env: dict | None = None):
    """``fn(*args)`` on every rank; the list of (result, output) by rank. ``fn`` is a module's function."""
    folder = tempfile.mkdtemp(prefix="megagpt-ranks-")
    port = free_port()
    jobs = []
    try:
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            log = Path(folder, f"rank{rank}.log")
            variables = {**rank_env(rank, world_size, port, folder), **(env or {})}
            process = _context.Process(target=_child, args=(theirs, fn, args, variables, str(log)))
            process.start()
            theirs.close()
            jobs.append((process, ours, log))
        return _collect(jobs, time.monotonic() + timeout)
    finally:
        for process, _, _ in jobs:
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _collect(jobs, deadline):
    results = []
    for rank, (_, pipe, log) in enumerate(jobs):
        status, value = "error", "the process died without a word"
        with contextlib.suppress(EOFError):
            if pipe.poll(max(0.0, deadline - time.monotonic())):
                status, value = pipe.recv()
            else:
                value = "no result in time"
        output = log.read_text(errors="replace") if log.exists() else ""
        if status != "ok":
            logs = "\n".join(f"--- rank {r}\n{job[2].read_text(errors='replace')}" for r, job in enumerate(jobs))
            raise RankFailed(f"rank {rank}: {value}\n{logs}")
        results.append((value, output))
    return results


def train(argv: list[str], ranks: int = 1, *, timeout: float = 180, env: dict | None = None) -> tuple[list[int], str]:
    """``train.py`` with ``argv`` on ``ranks`` processes: their exit codes and all that they printed, rank by rank."""
    results = run_ranks(train_main, ranks, [str(a) for a in argv], timeout=timeout, env=env)
    return [code for code, _ in results], "".join(output for _, output in results)


def finetune(argv: list, ranks: int = 1, *, timeout: float = 180, env: dict | None = None) -> tuple[list[int], str]:
    """``finetune.py`` with ``argv``, as :func:`train` runs ``train.py``."""
    results = run_ranks(finetune_main, ranks, [str(a) for a in argv], timeout=timeout, env=env)
    return [code for code, _ in results], "".join(output for _, output in results)
