"""Writing files so that a reader sees all of one or nothing, and saying plainly when a disk refuses."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from megagpt.errors import StorageError

_REASONS = {
    errno.ENOSPC: "no space left on the disk; free some and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the file system is read-only; choose another output",
    errno.EACCES: "no permission to write there; choose another output or change the folder's mode",
    errno.EPERM: "no permission to write there; choose another output or change the folder's mode",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another output",
    errno.EEXIST: "a part of the path is a file, not a folder; choose another output",
    errno.ENOENT: "its folder does not exist; make it, or choose another output",
    errno.EISDIR: "it is a folder; give the name of a file",
    errno.EIO: "the disk reported an input/output error",
}


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn what the operating system raises while ``path`` is written into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno, error.strerror or str(error))
        raise StorageError(f"cannot write {path}: {reason}") from error


def replace(path: Path, content: bytes | str) -> None:
    """Put ``content``, text in UTF-8, in the place of ``path``: a reader sees the old or the new, never a part.

    It survives a loss of power. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to be told
            temporary.unlink()
        raise
    sync_path(path.parent)


def write_atomically(path: Path, content: bytes | str) -> None:
    """:func:`replace`. Raises StorageError."""
    with storage_errors(path):
        replace(path, content)


def check_writable(path: Path) -> None:
    """Raise StorageError where ``path`` could not be written; to be asked before what will stand there is computed."""
    with storage_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            temporary.touch()
        finally:
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, so that they are there after a loss of power too.

    Raises OSError.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        with contextlib.suppress(PermissionError):  # a parent that may be entered and not read
            sync_path(folder.parent)


def sync(file) -> None:
    """Put what was written to ``file`` on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Put the bytes of a file, or the names in a folder, on the disk, as a rename alone does not. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems have no fsync of folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
