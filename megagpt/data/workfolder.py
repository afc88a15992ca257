"""The folder in which a corpus grows: one process at a time, and a record of how far it had come.

``state.json`` tells what was on the disk when it was written and which job it belongs to; it is replaced in one step.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from megagpt.data.storage import storage_errors, write_atomically
from megagpt.errors import ConfigError, DataError, StorageError

_LOCK, _STATE = "lock", "state.json"


class WorkFolder:
    """``path``, used by the job that ``fingerprint`` names."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self._fingerprint = fingerprint
        self._made: list[Path] = []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and keep others out of it. It stays behind only where the same command can go on from it."""
        with storage_errors(self.path):
            self._made = [folder for folder in self.path.parents if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / _LOCK, "w")  # noqa: SIM115 closed below
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is at work in {self.path}; wait for it to end") from None
            except OSError:  # file systems of clusters are often mounted without locks
                print(f"{self.path}: its file system has no locks; start no second job for this output", flush=True)
            try:
                yield
            except (ConfigError, DataError):  # the same command would fail again
                self._remove()
                raise
            except StorageError:
                if not self.state():  # a full disk gets its space back
                    self._remove()
                raise
            except KeyboardInterrupt:
                print("interrupted; the same command goes on from here", flush=True)
                raise
            self._remove()

    def state(self) -> dict:
        """What an interrupted run of the same job recorded last; empty where there is none."""
        try:
            state = json.loads((self.path / _STATE).read_bytes())
        except (OSError, ValueError):
            return {}
        return state if state.get("fingerprint") == self._fingerprint else {}

    def record(self, **state) -> None:
        write_atomically(self.path / _STATE, json.dumps({"fingerprint": self._fingerprint, **state}).encode())

    def clear(self) -> None:
        """Remove what another job has left."""
        with storage_errors(self.path):
            for path in self.path.iterdir():
                if path.name != _LOCK:
                    path.unlink()

    def _remove(self) -> None:
        """Remove the folder, and those above it that were made for it and have stayed empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()
