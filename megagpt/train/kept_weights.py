"""The weights alone of checkpoints that will be deleted, a quarter or a third of them, to look back at a run with."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from megagpt.errors import MegaGPTError
from megagpt.model.tensors import write_safetensors
from megagpt.train import manifest
from megagpt.train.intervals import due
from megagpt.train.report import TOKENIZER
from megagpt.train.weights import open_weights


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


def keep(checkpoint: Path, *, is_new: bool = False) -> str:
    """Write the float32 weights of ``checkpoint``, a tensor at a time, to RUN_DIR/weights/global_step<N>.

    The line to show: training goes on where that fails. One that ``is_new`` is not verified: the others wait. Rank 0
    alone calls this.
    """
    run_dir = checkpoint.parent.parent
    final = run_dir / manifest.KEPT_WEIGHTS / checkpoint.name
    tmp = final.with_name(f".tmp-{final.name}")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of a process that was killed
        manifest.make_folder(final.parent)
        tmp.mkdir()
        tensors, model = open_weights(checkpoint, **({"problem": lambda folder: None} if is_new else {}))
        about = {"config": json.dumps(model)}
        if sha256 := manifest.read_source(checkpoint).tokenizer_sha256:
            about["tokenizer_sha256"] = sha256
        write_safetensors(tmp / manifest.WEIGHTS, tensors, tensors.shapes, about)
        if (run_dir / TOKENIZER).exists():
            shutil.copyfile(run_dir / TOKENIZER, tmp / TOKENIZER)
            manifest.fsync(tmp / TOKENIZER)
        manifest.fsync(tmp)
        shutil.rmtree(final, ignore_errors=True)  # of a step that a resumed run repeats
        tmp.rename(final)
        manifest.fsync(final.parent)
    except (OSError, MegaGPTError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        return f"WARNING: the weights of {checkpoint.name} cannot be kept, going on: {error}"
    return f"kept the weights of step {manifest.step_of(checkpoint)} in {final}"
