"""A folder that appears when it is complete, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megagpt.data.storage import storage_errors, sync_path
from megagpt.errors import ConfigError, StorageError


def check_new(to: Path) -> None:
    """Raise ConfigError where there is something under that name already."""
    if os.path.lexists(to):
        raise ConfigError(f"--to {to} exists already; choose a folder that does not, or remove it first")


@contextlib.contextmanager
def new_folder(to: Path, n_bytes: int) -> Iterator[Path]:
    """A hidden folder beside ``to``, which gets that name in the end and is removed where something fails.

    ``n_bytes`` is about what will be written. Raises ConfigError where ``to`` exists, StorageError where the disk has
    no room or refuses.
    """
    check_new(to)
    home = to.absolute().parent
    with storage_errors(to):
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free
    if free < n_bytes:
        raise StorageError(
            f"{home} has {free / 1e9:,.2f} GB free and {to.name} takes about {n_bytes / 1e9:,.2f} GB; "
            "free some space, or choose another --to"
        )
    hidden = home / f".tmp-{to.name}-{os.getpid()}"
    try:
        with storage_errors(to):
            hidden.mkdir()
            yield hidden
            sync_path(hidden)
            check_new(to)  # of another process, meanwhile
            os.rename(hidden, to)
            sync_path(home)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
