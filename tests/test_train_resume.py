"""A run that was stopped and resumed is the run that was not, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint_common import curve, stopped_after, tensors
from corpora import tiny_corpus
from distributed import train

STEPS = 8


def ds_config(folder: Path, stage: int, precision: str) -> Path:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": precision == "bf16"},
    }
    path = folder / f"zero{stage}_{precision}.json"
    path.write_text(json.dumps(config))
    return path


def arguments(config: Path, run_dir: Path, *more) -> list:
    prefix = tiny_corpus()
    shape = ["--n_layer", 2, "--d_model", 32, "--n_head", 2, "--seq_len", 32, "--dropout", 0.1]
    data = ["--data", prefix, "--valid_data", f"books={prefix}-valid", "--eval_steps", 2]
    when = ["--log_interval", 1, "--eval_interval", 3, "--save_interval", 3, "--keep_last", 9]
    return [
        *["--ds_config", config, "--model", "tiny", *shape, *data, "--run_dir", run_dir],
        *["--max_steps", STEPS, "--warmup_steps", 2, "--lr", 1e-3, *when, *more],
    ]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path, stage, precision, ranks):
    config = ds_config(tmp_path, stage, precision)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(arguments(config, whole), ranks)[0] == [0] * ranks
    expected = curve(whole)

    stopped_after(whole, stopped, 3)  # which is also an evaluation step
    codes, output = train(arguments(config, stopped), ranks)
    assert codes == [0] * ranks, output
    assert "step 3 of 8" in output
    assert curve(stopped) == expected
    ours = tensors(stopped / "checkpoints" / f"global_step{STEPS}")
    theirs = tensors(whole / "checkpoints" / f"global_step{STEPS}")
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
