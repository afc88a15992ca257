"""Writing the files of a checkpoint: several at once, each hashed and forced to disk on the way, errors by their names.

One core hashes as fast as a disk writes, and the copy into the kernel's memory takes half as long again. So hashing,
copying and the disk's own work go on side by side, and two files beside each other.
"""

import copy
import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megagpt.data import storage
from megagpt.errors import StorageError
from megagpt.train import faults, manifest

_FILES = 2  # written at a time: weights and optimiser states
_HASH_APART = 1 << 20  # bytes from which hashing in a second thread beside the write pays
_CHUNK = 1 << 23  # bytes handed to the kernel before the disk is told to begin with them


class HashingFile:
    """A write-only file that hashes what passes through and remembers the first error of the disk.

    torch.save reports a full disk as a broken archive; the error kept here says what it was.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed by close()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        hashing = self._pool.submit(self._digest.update, view) if len(view) >= _HASH_APART else None
        try:
            self._write(view)
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            # The memory is the caller's again when this call returns.
            if hashing is not None:
                hashing.result()
        if hashing is None:
            self._digest.update(view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        while view:
            written = self._file.write(view[:_CHUNK])
            _begin_writeback(self._file.fileno(), self.size, written)
            self.size += written
            view = view[written:]

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> str:
        """Force the file to disk; its SHA-256 in hex."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self.abandon()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._file.close()
        self._pool.shutdown()


def _begin_writeback(fd: int, offset: int, size: int) -> None:
    """Have the disk begin with these bytes, so that ``fsync`` finds little to do. A hint: it may do nothing."""
    if hasattr(os, "posix_fadvise") and size >= _HASH_APART:
        # Linux starts to write dirty pages that will not be needed, and keeps them until they are written.
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def copy_to_cpu(value, storages: dict):
    """``value`` with every tensor in it copied to the CPU; tensors that share memory still do, by ``storages``."""
    if torch.is_tensor(value):
        storage = value.untyped_storage()
        key = (storage.data_ptr(), value.device)
        if key not in storages or not storage.nbytes():
            storages[key] = storage.cpu() if value.device.type != "cpu" else storage.clone()
        tensor = torch.empty(0, dtype=value.dtype)
        return tensor.set_(storages[key], value.storage_offset(), value.size(), value.stride())
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({key: copy_to_cpu(part, storages) for key, part in value.items()})
        return copied
    if type(value) in (list, tuple):
        return type(value)(copy_to_cpu(part, storages) for part in value)
    return copy.deepcopy(value)


class Writer:
    """Stands in for the save function of DeepSpeed's checkpoint engine: writes, hashes and syncs in one pass.

    Files are written while DeepSpeed goes on to the next; the tensors must not change before :meth:`finish` returns,
    unless they are ``copied`` to the CPU's memory first. A
    failure is kept and not raised, for the other ranks wait in DeepSpeed's barrier; :meth:`raise_error` comes later.
    """

    def __init__(self, folder: Path, *, copied: bool = False) -> None:
        self.folder = folder
        self._copied = copied
        self.entries: list[manifest.FileEntry] = []
        self.error: Exception | None = None
        self._pool = ThreadPoolExecutor(_FILES, thread_name_prefix="checkpoint")
        self._pending: list[Future] = []

    def save(self, state_dict, path) -> None:
        """Begin to write ``state_dict`` to ``path``."""
        if self._copied:
            state_dict = copy_to_cpu(state_dict, {})
        self._pending.append(self._pool.submit(self._save, state_dict, Path(path)))

    def done(self) -> bool:
        """Whether every file is written, or has failed."""
        return all(job.done() for job in self._pending)

    def finish(self) -> None:
        """Wait for every file. A second call does nothing."""
        self._pool.shutdown()
        for job in self._pending:
            try:
                self.entries.append(job.result())
            except (OSError, RuntimeError) as error:
                self.error = self.error or error
        self._pending.clear()

    def _save(self, state_dict, path: Path) -> manifest.FileEntry:
        file = HashingFile(path)
        try:
            faults.point("file_opened")
            torch.save(state_dict, file)
            faults.point("file_written")
            digest = file.close()
            faults.point("file_synced")
        except (OSError, RuntimeError):
            file.abandon()
            if file.error is not None:
                raise file.error from None
            raise
        return manifest.FileEntry(str(path.relative_to(self.folder)), file.size, digest)

    def add_existing(self, pattern: str) -> None:
        """Hash files that something else wrote (states offloaded to NVMe are copied by DeepSpeed itself)."""
        for path in sorted(self.folder.glob(pattern)):
            if path.is_file():
                storage.sync_path(path)
                self.entries.append(manifest.hash_file(self.folder, str(path.relative_to(self.folder))))

    def raise_error(self) -> None:
        if isinstance(self.error, OSError):
            raise StorageError(f"cannot write the checkpoint {self.folder}: {self.error.strerror or self.error}")
        if self.error is not None:
            raise StorageError(f"cannot write the checkpoint {self.folder}: {self.error}")
