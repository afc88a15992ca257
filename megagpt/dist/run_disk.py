"""The disk of the run folder, as every host of a job sees it."""

import os
import shutil
import time
from pathlib import Path

from megagpt.dist.gather import gather_json
from megagpt.dist.world import World, host_name
from megagpt.errors import ConfigError


def folder_problem(world: World, folder: Path) -> str | None:
    """Why this rank's host cannot use the run folder, told by its first rank. Rank 0 makes it; others have to find it.

    Every rank calls this. Raises ConfigError where no host can use it: then it is the folder that is wrong.
    """
    problem = _make(folder) if world.rank == 0 else None
    is_made = gather_json([problem])[0] == [None]
    if world.local_rank == 0 and world.rank:
        problem = _find(folder) if is_made else _make(folder)
    told = gather_json([problem] if world.local_rank == 0 else None)  # one of each host
    reasons = [host[0] for host in told if host is not None]
    if all(reasons):
        error = ConfigError(f"the run folder cannot be used: {reasons[0]}; correct --run_dir, or make it")
        error.on_every_rank = True
        raise error
    return problem


def _make(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return f"{folder} is a file"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return None


def _find(folder: Path) -> str | None:
    """What is wrong with a folder that another host has made.

    That it cannot be made again is the proof that it is the same one; looking could give what a network disk remembers.
    """
    try:
        folder.mkdir()
    except FileExistsError:
        return None if folder.is_dir() else f"{folder} is a file"
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    folder.rmdir()
    return f"{folder} is not the folder of rank 0's host: it has to be on a disk that all hosts share"


def measure_disk(folder: Path) -> tuple[int, float]:
    """Free bytes of the run folder's disk, and bytes per second written to it and forced out."""
    path = folder / f".preflight-{host_name()}-{os.getpid()}"
    block = os.urandom(1 << 20)
    begun = time.perf_counter()
    try:
        with open(path, "wb") as file:
            for _ in range(16):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return shutil.disk_usage(folder).free, 16 * len(block) / (time.perf_counter() - begun)
    finally:
        path.unlink(missing_ok=True)
