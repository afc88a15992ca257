"""The run folder belongs to one user, and to one job at a time."""

import fcntl
import os
import re
import stat
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from megagpt import dist
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
        manifest.make_folder(run_dir)
        file = open(run_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 held open while the run lasts
    except OSError as error:
        raise StorageError(f"cannot write to {flag} {run_dir}: {error.strerror}; choose a writable folder") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"{run_dir} is in use by {owner}; wait for it, or choose another {flag}") from None
    except OSError:  # file systems of clusters are often mounted without locks
        print(f"{run_dir}: its file system has no locks; start no second job for this folder", flush=True)
    file.truncate(0)
    job = f"Slurm job {os.environ['SLURM_JOB_ID']}, " if "SLURM_JOB_ID" in os.environ else ""
    file.write(f"{job}process {os.getpid()} on {os.uname().nodename}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    retention.remove_leftovers(run_dir / manifest.FOLDER)
    return file


def _refuse_open_folders(run_dir: Path, flag: str) -> None:
    """Raise ConfigError where everybody could put a checkpoint among those of this run."""
    for path in (run_dir, run_dir / manifest.FOLDER):
        if path.is_dir() and path.stat().st_mode & stat.S_IWOTH:
            raise ConfigError(
                f"{path} can be written by every user of this machine, who could change the run's checkpoints; "
                f"take that away (chmod o-w {path}), or choose another {flag}"
            )
