"""The run folder belongs to one job at a time."""

import fcntl
import os
import time
from contextlib import contextmanager
from pathlib import Path

from megagpt import dist
from megagpt.errors import ConfigError, StorageError
from megagpt.train import manifest, retention


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
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
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
    file.write(f"process {os.getpid()} on {os.uname().nodename}, started {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    retention.remove_leftovers(run_dir / manifest.FOLDER)
    return file
