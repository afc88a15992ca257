"""A second, slower place for checkpoints: copied in the background, verified on the way, fallen back on at resume."""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megagpt import dist
from megagpt.data import storage
from megagpt.errors import CheckpointError, StorageError
from megagpt.train import checkpoint, faults, manifest, retention

_CHUNK = 1 << 22


def copy(folder: Path, root: Path) -> Path:
    """Copy the checkpoint ``folder`` under ``root``, by the same protocol as a save; its folder there.

    Raises StorageError where ``root`` cannot take it, or ``folder`` is not what its manifest says.
    """
    tmp, final = root / manifest.tmp_name(manifest.step_of(folder)), root / folder.name
    try:
        files = manifest.read(folder)["files"]
        storage.make_folder(root)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        for name, entry in files.items():
            (tmp / name).parent.mkdir(parents=True, exist_ok=True)
            if _copy_file(folder / name, tmp / name) != entry["sha256"]:
                raise ValueError(f"{name} is damaged")
            faults.point("mirror_file_copied")
        _copy_file(folder / manifest.MANIFEST, tmp / manifest.MANIFEST)
        manifest.publish(tmp, final)
        manifest.write_latest(root, manifest.step_of(folder))
    except (OSError, ValueError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise StorageError(f"cannot copy {folder} to {root}: {getattr(error, 'strerror', None) or error}") from None
    return final


def _copy_file(source: Path, target: Path) -> str:
    """Copy a file and force it to disk; the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[write.write(view) :]
        os.fsync(write.fileno())
    return digest.hexdigest()


class Mirror:
    """Copies checkpoints to ``root`` one after the other, on a thread of rank 0.

    A checkpoint that is committed while another is copied waits; a newer one takes its place in the queue.
    """

    def __init__(self, root: Path, *, keep_last: int, say: Callable[[str], None] = print) -> None:
        self.root = root
        self._keep_last = keep_last
        self._say = say
        self._next: tuple[Path, set[int]] | None = None
        self._current: Path | None = None
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._news: list[str] = []

    def start(self, folder: Path, keep: set[int]) -> None:
        """Have ``folder`` copied soon. The steps in ``keep`` stay in the mirror, as the newest ones do."""
        self.tell()
        with self._lock:
            self._next = (folder, keep)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def in_use(self) -> set[int]:
        """Steps that are to be copied yet: they must not be deleted."""
        with self._lock:
            waiting = [self._next[0]] if self._next else []
            return {manifest.step_of(folder) for folder in [*waiting, *([self._current] if self._current else [])]}

    def _work(self) -> None:
        while True:
            with self._lock:
                if self._next is None:
                    self._thread = None
                    return
                (self._current, keep), self._next = self._next, None
            try:
                copy(self._current, self.root)
                retention.prune(self.root, self._keep_last, keep)
            except StorageError as error:
                self._news.append(f"WARNING: the mirror is behind, training goes on: {error}")
            finally:
                with self._lock:
                    self._current = None

    def tell(self) -> None:
        """Say what has gone wrong since the last time."""
        while self._news:
            self._say(self._news.pop(0))

    def finish(self, seconds: float = 300.0) -> None:
        """Wait until all is copied, for at most so long: the other ranks wait for this one."""
        deadline = time.monotonic() + seconds
        thread = self._thread
        while thread is not None and thread.is_alive():
            dist.beat("mirror", 0)
            thread.join(min(5.0, max(0.0, deadline - time.monotonic())))
            if time.monotonic() >= deadline:
                self._news.append(f"WARNING: the copy to {self.root} took more than {seconds:g} s and is given up")
                break
        self.tell()


def of(settings, say: Callable[[str], None]) -> Mirror | None:
    """The mirror that ``settings`` ask for, on rank 0."""
    if settings.mirror is None or not dist.is_main():
        return None
    return Mirror(Path(settings.mirror, manifest.FOLDER), keep_last=settings.keep_last, say=say)


def newest_intact(root: Path, mirror: Path) -> tuple[Path | None, list[str]]:
    """Like :func:`manifest.newest_intact`, with a newer intact checkpoint of ``mirror`` copied back.

    Every rank calls this. Raises CheckpointError where there are checkpoints and none is intact in either place,
    StorageError where the copy cannot be written.
    """
    source, notes, failure = None, [], None
    try:
        source, notes = manifest.newest_intact(root, checkpoint.problem, checkpoint.folders)
    except CheckpointError as error:
        failure = error
    step = -1 if source is None else manifest.step_of(source)
    for folder in checkpoint.folders(mirror):
        if manifest.step_of(folder) <= step:
            break
        reason = checkpoint.problem(folder)
        if reason is not None:
            notes.append(f"skipped checkpoint {folder.name} of {mirror}: {reason}")
            continue
        dist.everywhere(lambda folder=folder: copy(folder, root) if dist.is_main() else None)
        before = [str(failure)] if failure else []
        return root / folder.name, [*before, *notes, f"copied {folder.name} back from {mirror}"]
    if failure is not None:
        raise failure
    return source, notes
