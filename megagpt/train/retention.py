"""Which checkpoints stay on disk, and what dead runs have left."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megagpt.train import faults, manifest

_TMP = re.compile(r"^\.tmp-(old-|universal-)?global_step[0-9]+$")
_TMP_FILE = re.compile(rf"^\.{manifest.LATEST}\.tmp-[0-9]+$")


def remove_leftovers(root: Path) -> list[Path]:
    """Delete what dead runs left half-written under ``root``; the caller holds the run folder's lock."""
    found = list(root.iterdir()) if root.is_dir() else []
    leftovers = [p for p in found if _TMP.match(p.name) and p.is_dir()]
    for folder in leftovers:
        manifest.remove(folder)
    for path in found:
        if _TMP_FILE.match(path.name):
            path.unlink(missing_ok=True)
    return leftovers


def prune(root: Path, keep_last: int, keep: set[int], passed_over: Iterable[int] = ()) -> list[int]:
    """Delete all checkpoints but the ``keep_last`` newest and the steps in ``keep``; the deleted steps.

    At least the two newest stay whatever ``keep_last`` says, for one of them may turn out damaged. Those
    ``passed_over`` because they are damaged are neither deleted nor counted, nor those whose files lack a byte.
    """
    deleted = []
    ours = [
        folder
        for folder in manifest.folders(root)
        if manifest.step_of(folder) not in passed_over and manifest.seems_whole(folder)
    ]
    for folder in ours[max(2, keep_last) :]:
        step = manifest.step_of(folder)
        if step in keep:
            continue
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = root / manifest.tmp_name(step)
        with contextlib.suppress(OSError):
            os.rename(folder, doomed)
            faults.point("prune_renamed")
            shutil.rmtree(doomed, ignore_errors=True)
            deleted.append(step)
            faults.point("pruned")
    return deleted
