"""The weights alone of checkpoints that will be deleted: a quarter of the size, to look back at a run with."""

import json
import shutil
from pathlib import Path

from megagpt.errors import MegaGPTError
from megagpt.model.tensors import write_safetensors
from megagpt.train import manifest
from megagpt.train.report import TOKENIZER
from megagpt.train.weights import open_weights

FOLDER = "weights"


def keep(checkpoint: Path) -> str:
    """Write the float32 weights of ``checkpoint``, a tensor at a time, to RUN_DIR/weights/global_step<N>.

    The line to show: training goes on where that fails. Rank 0 alone calls this.
    """
    run_dir = checkpoint.parent.parent
    final = run_dir / FOLDER / checkpoint.name
    tmp = final.with_name(f".tmp-{final.name}")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of a process that was killed
        tmp.mkdir(parents=True)
        tensors, model = open_weights(checkpoint)
        about = {"config": json.dumps(model)}
        if sha256 := manifest.read_source(checkpoint).tokenizer_sha256:
            about["tokenizer_sha256"] = sha256
        write_safetensors(tmp / manifest.WEIGHTS, tensors, tensors.shapes, about)
        if (run_dir / TOKENIZER).exists():
            shutil.copyfile(run_dir / TOKENIZER, tmp / TOKENIZER)
        shutil.rmtree(final, ignore_errors=True)  # of a step that a resumed run repeats
        tmp.rename(final)
        manifest.fsync(final.parent)
    except (OSError, MegaGPTError) as error:
        shutil.rmtree(tmp, ignore_errors=True)
        return f"WARNING: the weights of {checkpoint.name} cannot be kept, going on: {error}"
    return f"kept the weights of step {manifest.step_of(checkpoint)} in {final}"
