"""A disk that refuses the k-th operation of a save in this process: open, write, fsync, mkdir or rename."""

import errno
import io
import os
import sys
import threading
from pathlib import Path


class _File(io.FileIO):
    """A file whose writes the disk may refuse."""

    def write(self, data) -> int:
        DISK.operation("write", self.name)
        return super().write(data)


def _open(path, mode: str = "r", buffering: int = -1, encoding: str | None = None):
    """As the built-in does, with files to write that know of the disk."""
    if mode not in ("w", "wb"):
        return open(path, mode, buffering, encoding)
    file = _File(path, "w")
    buffered = file if buffering == 0 else io.BufferedWriter(file)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=encoding)


class FailingDisk:
    """Counts the operations on names and files under ``root`` since a save began, and refuses one of them.

    What is read, and what is deleted, is not counted.
    """

    def __init__(self) -> None:
        self.root = ""
        self.refuse(0, "")
        self._count = 0
        self._counting = threading.Lock()  # files are written by threads

    def insert(self, root: Path) -> None:
        """Stand between this process and ``root`` from now on; there is no way back."""
        from megagpt.data import storage
        from megagpt.train import faults, manifest, writer

        if not self.root:
            storage.open = writer.open = manifest.open = _open
            self._fsync, self._point = os.fsync, faults.point
            os.fsync, faults.point = self._sync, self._passed
            sys.addaudithook(self._hear)
        self.root = str(root)
        self.refuse(0, "")

    def refuse(self, number: int, error: str, times: int | None = 1) -> None:
        """From now on the operation ``number`` (from 1 on) of a save fails with ``error``, in so many saves.

        With None it fails in every one, and so does what comes after it. The number 0 is none.
        """
        self._number, self._error, self._times = number, error, times
        self.refused: list[str] = []

    def operation(self, what: str, path) -> None:
        """Raises OSError where this one is to be refused."""
        path = os.path.abspath(os.fsdecode(path))
        if not f"{path}/".startswith(f"{self.root}/"):
            return
        with self._counting:
            self._count += 1
            due = self._count == self._number and len(self.refused) < (self._times or 0)
            if not due and not (self._times is None and 0 < self._number <= self._count):
                return
            self.refused.append(f"{what} {os.path.relpath(path, self.root)}")
        code = getattr(errno, self._error)
        raise OSError(code, os.strerror(code), path)

    def _passed(self, place: str) -> None:
        if place == "save_begun":
            with self._counting:
                self._count = 0
        self._point(place)

    def _sync(self, fd: int) -> None:
        self.operation("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        self._fsync(fd)

    def _hear(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            if isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
                self.operation("open", args[0])
        elif event == "os.mkdir" and not os.path.isdir(args[0]):
            self.operation("mkdir", args[0])
        elif event == "os.rename":
            self.operation("rename", args[0])


DISK = FailingDisk()
