"""When the cluster will end this job."""

import os
import subprocess
import threading
import time
from collections.abc import Mapping
from datetime import datetime

_ASK_EVERY = 600.0  # seconds: an administrator may move the end
_PATIENCE = 30.0  # seconds that squeue may take on a busy controller


def job_end(env: Mapping[str, str] = os.environ) -> float | None:
    """The Unix time at which Slurm ends this job; None outside a job, without a limit, or where Slurm doesn't tell.

    Older releases don't set SLURM_JOB_END_TIME, and its value stays what it was when the job began: squeue comes first.
    """
    job = env.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        return None
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%e"], capture_output=True, text=True, timeout=_PATIENCE, check=True
        )
        return datetime.fromisoformat(asked.stdout.split()[0]).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        told = env.get("SLURM_JOB_END_TIME", "")
        return float(told) if told.isdigit() else None


class JobEnd:
    """The end of this job, asked for beside the training: a step never waits for squeue."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        self._env = env
        self._asked = float("-inf")
        self._thread: threading.Thread | None = None
        self.time: float | None = None  # Unix seconds, as far as known

    def refresh(self) -> None:
        """Ask again if the last answer is old; returns at once."""
        now = time.monotonic()
        if "SLURM_JOB_ID" not in self._env or now - self._asked < _ASK_EVERY:
            return
        self._asked = now
        self._thread = threading.Thread(target=self._ask, name="job end", daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        self.time = job_end(self._env)
