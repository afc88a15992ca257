"""The weights alone of checkpoints that will be deleted, a quarter or a third of them, to look back at a run with."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from megagpt.data import storage
from megagpt.errors import MegaGPTError
from megagpt.model.tensors import write_safetensors
from megagpt.train import checkpoint, manifest
from megagpt.train.intervals import due
from megagpt.train.report import TOKENIZER
from megagpt.train.weights import open_weights


def bytes_of(n_params: int) -> int:
    """Of one checkpoint's weights."""
    return 4 * n_params


def bytes_to_come(run_dir: Path, n_params: int, total_steps: int, interval: int) -> int:
    """About what the weights take that a run of ``total_steps`` has still to keep."""
    if not interval:
        return 0
    there = [step for step in map(manifest.step_of, manifest.folders(run_dir / manifest.KEPT_WEIGHTS)) if step]
    n = total_steps // interval - sum(due(step, interval) and step <= total_steps for step in there)
    return n * bytes_of(n_params)


def space_warnings(run_dir: Path, needed: int, to_come: int) -> list[str]:
    """A line where the disk has room for a checkpoint of ``needed`` bytes, and not for ``to_come`` of weights too.

    They are never deleted, so the disk would be full before the run's end.
    """
    free = shutil.disk_usage(run_dir).free
    if not to_come or free >= needed + to_come:
        return []
    return [
        f"WARNING: {run_dir} has {checkpoint.size(free)} free, and the weights that --keep_weights_interval has still "
        f"to keep take about {checkpoint.size(to_come)} beside a checkpoint of {checkpoint.size(needed)}; free some "
        "space in time, or raise --keep_weights_interval"
    ]


def keep_missing(root: Path, interval: int, passed_over: Iterable[int]) -> list[str]:
    """:func:`keep` for the checkpoints at multiples of ``interval`` whose weights are not there; the lines to show.

    A start that was killed between a checkpoint and its weights, or had no room for them, has left such. Those
    ``passed_over`` are damaged.
    """
    folder = root.parent / manifest.KEPT_WEIGHTS
    for path in folder.glob(".tmp-global_step*"):
        shutil.rmtree(path, ignore_errors=True)
    steps = {step for step in map(manifest.step_of, manifest.folders(root)) if due(step, interval)}
    steps -= {*passed_over, *map(manifest.step_of, manifest.folders(folder))}
    return [keep(root / manifest.tag_name(step)) for step in sorted(steps)]


def keep(saved: Path, *, is_new: bool = False) -> str:
    """Write the float32 weights of the checkpoint ``saved``, a tensor at a time, to RUN_DIR/weights/global_step<N>.

    The line to show: training goes on where that fails. One that ``is_new`` is not verified: the others wait. Rank 0
    alone calls this.
    """
    run_dir = saved.parent.parent
    final = run_dir / manifest.KEPT_WEIGHTS / saved.name
    tmp = final.with_name(f".tmp-{final.name}")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of a process that was killed
        storage.make_folder(final.parent)
        tmp.mkdir()
        tensors, model = open_weights(saved, **({"problem": lambda folder: None} if is_new else {}))
        about = {"config": json.dumps(model)}
        if sha256 := manifest.read_source(saved).tokenizer_sha256:
            about["tokenizer_sha256"] = sha256
        write_safetensors(tmp / manifest.WEIGHTS, tensors, tensors.shapes, about)
        if (run_dir / TOKENIZER).exists():
            shutil.copyfile(run_dir / TOKENIZER, tmp / TOKENIZER)
            storage.sync_path(tmp / TOKENIZER)
        storage.sync_path(tmp)
        shutil.rmtree(final, ignore_errors=True)  # of a step that a resumed run repeats
        tmp.rename(final)
        storage.sync_path(final.parent)
    except (OSError, MegaGPTError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        return f"WARNING: the weights of {saved.name} cannot be kept, going on: {error}"
    return f"kept the weights of step {manifest.step_of(saved)} in {final}"
