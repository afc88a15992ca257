"""``megagpt launch``: start a script on the GPUs of this host as ``deepspeed`` does, and end as it ends.

The deepspeed command passes no signal on, leaves its ranks running when it is killed, and can report success when its
inner launcher was. Here signals reach every rank, the exit code is the script's own, and no rank outlives the command.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megagpt.dist import memory
from megagpt.dist.environment import for_ranks
from megagpt.dist.guard import LOST
from megagpt.dist.presence import LAUNCHER_PID
from megagpt.errors import ConfigError, nearest

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_GRACE = 10.0  # seconds in which the other ranks end by themselves, with their own messages, after one has failed
_VALUED, _SWITCHES = ("--num_gpus", "--include", "--master_port"), ("--module", "-m", "--help", "-h", "--")
_HELP = """start a script on the GPUs of this host, one process each:
megagpt launch --num_gpus 2 train.py --ds_config ds_configs/zero2.json ..."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ConfigError(f"{message}; megagpt launch --help lists the flags")


def launch_main(argv: list[str]) -> int:
    """Run ``megagpt launch``; the exit code of the script."""
    parser = _Parser(prog="megagpt launch", description=_HELP, allow_abbrev=False)
    parser.add_argument("--num_gpus", type=int, help="ranks: one a GPU, or on a host without GPUs as many as given")
    parser.add_argument("--include", help="the GPUs to use, localhost:0,2")
    parser.add_argument("--master_port", type=int, help="where the ranks meet; a free port by default")
    parser.add_argument("--module", "-m", action="store_true", help="the script is the name of a module")
    parser.add_argument("script", help="train.py, finetune.py or another one")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    _refuse_unknown(argv)
    flags = parser.parse_args(argv)
    _check_script(flags.script, flags.module)
    devices = _devices(flags.num_gpus, flags.include)
    command = [sys.executable, "-u", *(["-m"] if flags.module else []), flags.script, *flags.arguments]
    return Ranks(command, devices, flags.master_port or _free_port()).run()


def _refuse_unknown(argv: list[str]) -> None:
    """Raise ConfigError for a flag before the script that is none of ours; what follows the script is its own."""
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if not name.startswith("-"):
            return
        if name not in (*_SWITCHES, *_VALUED):
            known = nearest(name[:80], (*_VALUED, *_SWITCHES))
            raise ConfigError(f"unknown flag {name[:80]}{known}; megagpt launch --help lists the flags")
        if name in _VALUED and not equals:
            next(words, None)


def _check_script(script: str, is_module: bool) -> None:
    """Raise ConfigError for a script that is not there: every rank would say so in Python's words."""
    if is_module or Path(script).is_file():
        return
    folder = Path(script).parent
    names = [path.name for path in folder.glob("*.py")] if folder.is_dir() else []
    meant = nearest(Path(script).name, names)
    raise ConfigError(f"there is no script {script[:200]}{meant}; give the path of train.py, finetune.py or another one")


def _devices(number: int | None, include: str | None) -> list[str]:
    """The device of each rank as CUDA names it, or an empty text for a rank on the CPU."""
    if include is not None:
        host, _, devices = include.rpartition(":")
        if number is not None or host not in ("", "localhost", "127.0.0.1", socket.gethostname()):
            raise ConfigError(f"--include {include} is to be GPUs of this host, localhost:0,2, without --num_gpus")
        return devices.split(",")
    if number is not None and number < 1:
        raise ConfigError(f"--num_gpus {number} is no number of processes; give 1 or more")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [device for device in visible.split(",") if device]
    if not gpus:
        return [""] * (number or 1)
    if number is not None and number > len(gpus):
        raise ConfigError(f"--num_gpus {number} and this host has {len(gpus)}; lower it")
    return gpus[:number]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Ranks:
    """The processes of ``command``, one for each of ``devices``."""

    def __init__(self, command: list[str], devices: list[str], port: int) -> None:
        self._command, self._devices, self._port = command, devices, port
        self._processes: list[subprocess.Popen] = []
        self._memory_kills = memory.kills()

    def run(self) -> int:
        """Start all, wait for all, pass signals on; the exit code of the first that failed for a reason of its own."""
        handlers = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            for rank in range(len(self._devices)):
                # A session of its own: Ctrl-C in a terminal reaches a rank once, from here.
                process = subprocess.Popen(
                    self._command, env=self._env(rank), stdin=subprocess.DEVNULL, start_new_session=True
                )
                self._processes.append(process)
            return self._wait()
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _env(self, rank: int) -> dict[str, str]:
        size = str(len(self._devices))
        env = {
            **for_ranks(),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "LOCAL_SIZE": size,
            "CROSS_RANK": "0",
            "CROSS_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._port),
            LAUNCHER_PID: str(os.getpid()),
        }
        if self._devices[0]:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self._devices)
        return env

    def _forward(self, number: int, frame) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _tell_signal(self, rank: int, number: int) -> None:
        cause = ""
        if number == signal.SIGKILL and memory.killed_since(self._memory_kills):
            cause = "; meanwhile the kernel has killed a process of this host for want of memory"
        elif number == signal.SIGKILL:
            cause = "; if nobody has done that, the host was short of memory"
        name = signal.Signals(number).name
        print(f"rank {rank} on {socket.gethostname()} was ended by {name}{cause}", file=sys.stderr, flush=True)

    def _wait(self) -> int:
        code, deadline = 0, None
        waiting = dict(enumerate(self._processes))
        while waiting:
            for rank in [rank for rank, process in waiting.items() if process.poll() is not None]:
                found = waiting.pop(rank).returncode
                if found < 0:
                    self._tell_signal(rank, -found)
                    found = 128 - found  # as a shell reports it
                if found and deadline is None:
                    deadline = time.monotonic() + _GRACE
                if found and code in (0, LOST):  # a rank that lost its peer is not the cause
                    code = found
            if deadline is not None and time.monotonic() > deadline:
                for rank, process in waiting.items():
                    print(f"rank {rank} does not end and is killed", file=sys.stderr, flush=True)
                    process.kill()
                deadline = float("inf")
            time.sleep(0.05)
        return code
