"""The run folder belongs to one user, and to one job at a time."""

import fcntl
import os
import re
import stat
import subprocess
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from megagpt import dist
from megagpt.data import storage
from megagpt.errors import ConfigError, StorageError
from megagpt.train import manifest, retention

UMASK = "MEGAGPT_UMASK"


@contextmanager
def private(env: Mapping[str, str] = os.environ):
    """Inside, nobody else can read or write the files that are made; MEGAGPT_UMASK, in octal, may say otherwise.

    Raises ConfigError for one that is no mask, or lets everybody write.
    """
    told = env.get(UMASK) or "077"
    if not re.fullmatch(r"0*[0-7]{3}", told) or not int(told, 8) & stat.S_IWOTH:
        raise ConfigError(
            f"{UMASK}={told} has to be three octal digits that keep others from writing; "
            "unset it for files of your own, or set it to 027 to let your group read them"
        )
    before = os.umask(int(told, 8))
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def locked(run_dir: Path, mirror: str | None = None):
    """Hold the run folder, and its mirror, for this job: two jobs writing checkpoints to one folder would ruin both."""
    files = [dist.everywhere(lambda: _take_lock(run_dir) if dist.is_main() else None)]
    try:
        if mirror is not None:
            files.append(dist.everywhere(lambda: _take_lock(Path(mirror), "--mirror") if dist.is_main() else None))
        yield
    finally:
        for file in filter(None, files):
            file.close()


def _take_lock(run_dir: Path, flag: str = "--run_dir"):
    _refuse_open_folders(run_dir, flag)
    try:
        storage.make_folder(run_dir)
        file = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 held open while the run lasts
    except OSError as error:
        raise StorageError(f"cannot write to {flag} {run_dir}: {error.strerror}; choose a writable folder") from None
    file.seek(0)
    owner = file.read().strip()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_free = True
    except BlockingIOError:
        is_free = False
    except OSError:  # file systems of clusters are often mounted without locks
        is_free = not _lives(owner)
        if is_free:
            print(f"{run_dir}: its file system has no locks; start no second job for this folder", flush=True)
    if not is_free:
        file.close()
        raise ConfigError(f"{run_dir} is in use by {owner or 'another process'}; wait for it, or choose another {flag}")
    file.truncate(0)
    job = f"Slurm job {os.environ['SLURM_JOB_ID']}, " if "SLURM_JOB_ID" in os.environ else ""
    file.write(f"{job}process {os.getpid()} on {os.uname().nodename}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    retention.remove_leftovers(run_dir / manifest.FOLDER)
    return file


def _lives(owner: str, env: Mapping[str, str] = os.environ) -> bool:
    """Whether the job that wrote ``owner`` into a lock is known to run: to Slurm, or as a process of this host."""
    job = re.search(r"^Slurm job (\d+), ", owner)
    if job and job[1] != env.get("SLURM_JOB_ID"):  # the same job, requeued, has ended before
        try:
            asked = subprocess.run(["squeue", "-h", "-j", job[1], "-o", "%T"], capture_output=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return False
        return bool(asked.stdout.strip())
    process = re.search(r"process (\d+) on (.+), started ", owner)
    if not process or process[2] != os.uname().nodename or int(process[1]) == os.getpid():
        return False
    try:
        command = Path(f"/proc/{process[1]}/cmdline").read_bytes()
    except OSError:
        return False
    return b"python" in command or b"megagpt" in command  # its number may be another program's by now


def _refuse_open_folders(run_dir: Path, flag: str) -> None:
    """Raise ConfigError where everybody could put a checkpoint among those of this run."""
    for path in (run_dir, run_dir / manifest.FOLDER):
        if path.is_dir() and path.stat().st_mode & stat.S_IWOTH:
            raise ConfigError(
                f"{path} can be written by every user of this machine, who could change the run's checkpoints; "
                f"take that away (chmod o-w {path}), or choose another {flag}"
            )
