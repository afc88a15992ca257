"""Going back to the last checkpoint without the samples that spoilt an update: ``--on_nan rewind``.

What was left out is part of every later checkpoint and, because the next one may never be written, also in
rewinds.json of the run folder: a run that is resumed makes the same choice.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt import dist
from megagpt.data.storage import replace
from megagpt.errors import CheckpointError, NumericError, StorageError
from megagpt.train import checkpoint, manifest
from megagpt.train.batches import ranges

NAME = "rewinds.json"


def left_out(rewinds: list[dict]) -> list[list[int]]:
    """The samples that ``rewinds`` leave out, as ranges [first, end) in their order."""
    return sorted([first, end] for rewind in rewinds for first, end in rewind["samples"])


def known(run_dir: Path, state: checkpoint.TrainState) -> list[dict]:
    """The rewinds of the run whose checkpoint has ``state``: its own, and those from after it was saved.

    Every rank calls this and gets what rank 0 finds. A run at its very beginning has none; what an earlier one left is
    removed then. Raises CheckpointError for a file that is not ours.
    """
    return dist.gather_json(dist.everywhere(lambda: _read(run_dir / NAME, state) if dist.is_main() else None))[0]


def _read(path: Path, state: checkpoint.TrainState) -> list[dict]:
    if state.step == 0:
        path.unlink(missing_ok=True)
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        left_out(found)
    except FileNotFoundError:
        return state.rewinds
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(
            f"{path}, which says what samples to leave out, cannot be read ({error}); bring it back from a copy, or "
            "remove it to go on as the checkpoint says"
        ) from None
    return found if len(found) > len(state.rewinds) else state.rewinds


class Rewinder:
    """Takes a run back to its newest intact checkpoint, at most ``limit`` times; ``load(folder)`` loads one."""

    def __init__(self, run_dir: Path, root: Path, limit: int, load: Callable[[Path], checkpoint.TrainState]) -> None:
        self._run_dir, self._root, self._limit, self._load = run_dir, root, limit, load

    def target(self, state: checkpoint.TrainState) -> Path | None:
        """The checkpoint to go back to, or None where there is none yet. Every rank calls this.

        Raises NumericError where the run has gone back too often.
        """
        folder, _ = manifest.newest_intact(self._root, checkpoint.problem, checkpoint.folders)
        if folder is not None and len(state.rewinds) >= self._limit:
            raise NumericError(
                f"step {state.step}: the run has gone back {self._limit} times (--rewind_limit) and its numbers are "
                "again not finite; lower --lr or lengthen --warmup_steps in a new run from the last checkpoint"
            )
        return folder

    def go_back(self, state: checkpoint.TrainState, folder: Path, samples: np.ndarray) -> None:
        """Load ``folder`` and bring ``state`` back to it, with ``samples`` (ascending) left out from now on.

        Every rank calls this. Raises StorageError where the choice cannot be written down.
        """
        rewind = {"step": state.step, "to_step": manifest.step_of(folder), "samples": ranges(samples)}
        rewinds = [*state.rewinds, rewind]
        dist.everywhere(lambda: self._write(rewinds) if dist.is_main() else None)
        vars(state).update(vars(self._load(folder)))
        state.rewinds = rewinds

    def _write(self, rewinds: list[dict]) -> None:
        try:
            replace(self._run_dir / NAME, json.dumps(rewinds, indent=1) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {self._run_dir / NAME}, without which a resumed run would not leave out the same "
                f"samples: {error.strerror}"
            ) from None
