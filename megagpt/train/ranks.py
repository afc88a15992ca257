"""The global batch stays when the number of ranks changes: a resumed run solves its accumulation anew."""

import dataclasses
from pathlib import Path

from megagpt.config.kinds import AUTO
from megagpt.train import manifest

_TOTAL, _ACCUMULATION = "train_batch_size", "gradient_accumulation_steps"


def keep_global_batch(raw: dict, settings, world_size: int) -> tuple[dict, object]:
    """DeepSpeed file and flags for a run that goes on with ``world_size`` ranks.

    Where it was saved on another number the global batch is the checkpoint's, unless file or flags name one, and the
    accumulation is left open.
    """
    header = _saved(settings)
    if header is None or header["world_size"] == world_size or "batch" not in header:
        return raw, settings
    raw = {**raw, _ACCUMULATION: AUTO}
    if raw.get(_TOTAL, AUTO) == AUTO and settings.global_batch_size is None:
        raw[_TOTAL] = header["batch"][2]
    return raw, dataclasses.replace(settings, gradient_accumulation_steps=None)


def _saved(settings) -> dict | None:
    """The manifest of the checkpoint that the run probably goes on from; only its files say whether it can be."""
    if settings.resume == "never":
        return None
    path = Path(settings.run_dir if settings.resume == "auto" else settings.resume)
    for folder in [path] if manifest.step_of(path) is not None else manifest.folders(manifest.root_of(path)):
        try:
            return manifest.read(folder)
        except (ValueError, OSError):
            continue
    return None
