"""Whether the other ranks of this host still live, and whether their launcher does."""

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

LAUNCHER_PID = "MEGAGPT_LAUNCHER_PID"  # set by megagpt launch
_SCRIPTS = ("deepspeed", "ds", "torchrun")
_MODULES = ("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch.distributed.launch")


class Presence:
    """A sign of life of this rank that the others on its host see.

    It is a socket in Linux's abstract namespace, which leaves no file behind and vanishes with its process however that
    ends. Use it as a context.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        told = env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or ""
        self.local_rank = int(told) if told.isascii() and told.isdigit() else 0
        meeting = env.get("MASTER_PORT") or env.get("SLURM_JOB_ID") or ""
        self._base = f"\0megagpt-{os.getuid()}-{env.get('MASTER_ADDR', '')}-{meeting}-{env.get('SLURM_STEP_ID', '')}"
        self._is_job = bool(meeting)

    def __enter__(self) -> "Presence":
        self._sign = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if self._is_job:
            with suppress(OSError):  # the name is in use by another job on the same port, which cannot run anyway
                self._sign.bind(self._name(self.local_rank))
        return self

    def __exit__(self, *exc_info) -> None:
        self._sign.close()

    def _name(self, local_rank: int) -> str:
        return f"{self._base}-{local_rank}"

    def sees(self, local_rank: int) -> bool:
        """Whether the rank of that number on this host lives."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(self._name(local_rank))
            except OSError:
                return False
        return True


class Ancestry:
    """The launchers above this process, as far as they are known ones: the deepspeed command has two."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        told, pid = env.get(LAUNCHER_PID, ""), os.getppid()
        ours = told.isdigit() and (pid == int(told) or not Path(f"/proc/{told}").exists())
        self._chain = [int(told)] if ours else []  # which may be gone already
        while not ours and pid > 1 and _is_launcher(pid):
            self._chain.append(pid)
            pid = _parent(pid) or 0

    def is_orphan(self) -> bool:
        """True once one of the launchers has ended."""
        parent = os.getppid()
        for pid in self._chain:
            if parent != pid:
                return True
            parent = _parent(pid)
        return False


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(os.path.basename(word) in _SCRIPTS for word in words[:2]) or any(w in _MODULES for w in words[2:5])


def _parent(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1])
