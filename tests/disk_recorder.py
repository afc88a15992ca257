"""What two ranks do to the files of a folder, one operation after the other."""

import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoint_common import arguments
from fork_server import Job, train_main

from megagpt.train import faults


class Recorder:
    """Writes down what this process does to the files under ``base``, from any thread, one JSON object a line."""

    def __init__(self, base: str, out: Path) -> None:
        self.base, self.out = base, out
        self._fd = os.open(out / f"{os.getpid()}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._fsync, self._point = os.fsync, faults.point
        sys.addaudithook(self._hear)
        os.fsync, faults.point = self._sync, self._mark

    def _note(self, op: str, at: int, **what) -> None:
        line = json.dumps({"op": op, "at": at, "pid": os.getpid(), "thread": threading.get_ident(), **what}) + "\n"
        os.write(self._fd, line.encode())

    def _path(self, path, dir_fd: int = -1) -> str | None:
        if isinstance(path, int):
            return None
        path = os.fsdecode(path)
        if dir_fd is not None and dir_fd >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        path = os.path.abspath(path)
        return os.path.relpath(path, self.base) if f"{path}/".startswith(f"{self.base}/") else None

    def _hear(self, event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            path, op = self._path(args[0]), {"append": not args[2] & os.O_TRUNC}
        elif event in ("os.mkdir", "os.rmdir", "os.remove"):
            path, op = self._path(args[0], args[-1]), {}
        elif event == "os.rename":
            path, op = self._path(args[0], args[2]), {"to": self._path(args[1], args[3])}
        elif event in ("os.link", "os.symlink", "os.truncate"):
            raise AssertionError(f"{event} is not part of what is replayed")
        else:
            return
        if path is not None:
            self._note(event.removeprefix("os."), time.monotonic_ns(), path=path, **op)

    def _sync(self, fd: int) -> None:
        began = time.monotonic_ns()
        self._fsync(fd)
        path = self._path(os.readlink(f"/proc/self/fd/{fd}"))
        if path is not None:
            self._note("sync", time.monotonic_ns(), path=path, began=began, content=self._keep(path))

    def _keep(self, path: str) -> str | None:
        """The name under which the bytes of a file are kept; None for a folder."""
        whole = Path(self.base, path)
        if whole.is_dir():
            return None
        data = whole.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        if not (self.out / name).exists():
            (self.out / name).write_bytes(data)
        return name

    def _mark(self, place: str) -> None:
        self._note("mark", time.monotonic_ns(), path=".", place=place)
        self._point(place)


def _recorded(argv: list[str], base: str, out: str) -> int:
    Recorder(base, Path(out))
    return train_main(argv)


@dataclass
class Recording:
    """What two ranks did to the files of ``base``, in its order; ``before`` was on disk when they began."""

    events: list[dict]
    contents: dict[str, bytes]
    before: dict[str, bytes]
    folders_before: list[str]


def read(out: Path, before: dict[str, bytes] | None = None, folders_before: list[str] | None = None) -> Recording:
    """What processes with recorders have written to ``out``."""
    paths = sorted(out.iterdir())
    lines = [line for path in paths if path.suffix for line in path.read_text().splitlines()]
    contents = {path.name: path.read_bytes() for path in paths if not path.suffix}
    return Recording(
        sorted(map(json.loads, lines), key=lambda e: e["at"]), contents, before or {}, folders_before or []
    )


def record(base: Path, *more, **changes) -> Recording:
    """A run of two ranks in ``base``/run, up to its end."""
    base.mkdir(exist_ok=True)
    before = {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    folders = [str(p.relative_to(base)) for p in base.rglob("*") if p.is_dir()]
    with tempfile.TemporaryDirectory(prefix="megagpt-record-") as out:
        flags = [str(word) for word in arguments(base / "run", *more, **changes)]
        with Job(_recorded, flags, str(base), out) as job:
            assert job.wait(300) == [0, 0], job.output()
        return read(Path(out), before, folders)
