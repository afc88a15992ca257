"""Writing the files of a checkpoint: each is hashed and forced to disk in one pass, and errors keep their names."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from megagpt.errors import StorageError
from megagpt.train import manifest

_HASH_APART = 1 << 20  # bytes from which hashing in a second thread beside the write pays


class HashingFile:
    """A write-only file that hashes what passes through and remembers the first error of the disk.

    torch.save reports a full disk as a broken archive; the error kept here says what it was.
    """

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 closed by close()
        self._pool = pool
        self._digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        hashing = self._pool.submit(self._digest.update, view) if len(view) >= _HASH_APART else None
        try:
            written = 0
            while written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            # The memory is the caller's again when this call returns.
            if hashing is not None:
                hashing.result()
        if hashing is None:
            self._digest.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> str:
        """Force the file to disk; its SHA-256 in hex."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return self._digest.hexdigest()


class Writer:
    """Stands in for the save function of DeepSpeed's checkpoint engine: writes, hashes and syncs in one pass.

    A failure is kept and not raised, for the other ranks wait in DeepSpeed's barrier; :meth:`raise_error` comes later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[manifest.FileEntry] = []
        self.error: Exception | None = None

    def save(self, state_dict, path) -> None:
        if self.error is not None:
            return
        with ThreadPoolExecutor(max_workers=1) as pool:
            file = None
            try:
                file = HashingFile(Path(path), pool)
                # The manifest's SHA-256 says more than the archive's CRC-32, which torch does not check on reading.
                checked = torch.serialization.get_crc32_options()
                torch.serialization.set_crc32_options(False)
                try:
                    torch.save(state_dict, file)
                finally:
                    torch.serialization.set_crc32_options(checked)
                digest = file.close()
                self.entries.append(manifest.FileEntry(str(Path(path).relative_to(self.folder)), file.size, digest))
            except (OSError, RuntimeError) as error:
                self.error = (file.error if file is not None else None) or error
                if file is not None:
                    file._file.close()

    def add_existing(self, pattern: str) -> None:
        """Hash files that something else wrote (states offloaded to NVMe are copied by DeepSpeed itself)."""
        for path in sorted(self.folder.glob(pattern)):
            if path.is_file():
                manifest.fsync(path)
                self.entries.append(manifest.hash_file(self.folder, str(path.relative_to(self.folder))))

    def raise_error(self) -> None:
        if isinstance(self.error, OSError):
            raise StorageError(f"cannot write the checkpoint {self.folder}: {self.error.strerror or self.error}")
        if self.error is not None:
            raise StorageError(f"cannot write the checkpoint {self.folder}: {self.error}")
