"""metrics.jsonl: one JSON object a line, whole lines only, cut back to the checkpoint that a run resumes from.

A number that is not finite (the loss of a broken step, the norm of a skipped one) is written as null: JSON has no NaN.
"""

import contextlib
import json
import math
import os
from pathlib import Path

from megagpt.data.storage import replace, sync_path
from megagpt.errors import StorageError

NAME = "metrics.jsonl"


def read(path: Path) -> list[dict]:
    """The records of ``path`` in their order; a line that a killed writer left torn is no record."""
    records = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def truncate(path: Path, last_step: int) -> list[dict]:
    """Keep the records up to ``last_step``, for what came later happens again; what is kept."""
    if not path.exists():
        return []
    kept = [record for record in read(path) if record["step"] <= last_step]
    replace(path, "".join(_line(record) for record in kept))
    return kept


class MetricsFile:
    """The open metrics.jsonl of a run; ``skipped_steps`` is what its last kept record says of them.

    Raises StorageError when the run folder cannot be written.
    """

    def __init__(self, run_dir: Path, last_step: int) -> None:
        self.path = run_dir / NAME
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            kept = truncate(self.path, last_step)
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}; choose another --run_dir") from None
        self._is_named = False  # on disk, where its folder has been forced there
        self.skipped_steps: int = max((record.get("skipped_steps", 0) for record in kept), default=0)

    def write(self, record: dict) -> None:
        """Append one record and hand it to the system, so that ``tail -f`` and a crash see it. Raises OSError."""
        self._file.write(_line(record))
        self._file.flush()  # what a full disk refuses stays in the buffer and goes out with a later line

    def sync(self) -> None:
        """Force the records so far to disk. Raises OSError."""
        os.fsync(self._file.fileno())
        if not self._is_named:
            sync_path(self.path.parent)
            self._is_named = True

    def cut(self, last_step: int) -> None:
        """Remove the records after ``last_step``. Raises OSError."""
        self.close()
        truncate(self.path, last_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


def _line(record: dict) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
