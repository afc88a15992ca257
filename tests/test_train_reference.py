"""Training computes what a plain loop in torch computes, however it is sharded and however the batch is cut."""

import functools
import json

import pytest
import torch
from corpora import tiny_corpus
from distributed import train
from reference_gpt import ReferenceConfig, ReferenceGPT
from reference_gpt import train as reference_train

from megagpt.data.indexed import IndexedDataset
from megagpt.data.windows import Windows
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

STEPS, WARMUP, LR, SEED = 50, 5, 3e-3, 11
SHAPE = {"n_layer": 2, "d_model": 48, "n_head": 3, "seq_len": 32}


@functools.cache
def reference_losses(norm: str) -> list[float]:
    dataset = IndexedDataset(tiny_corpus())
    torch.manual_seed(SEED)
    config = GPTConfig(vocab_size=dataset.info.vocab_size, norm=norm, **SHAPE)
    ours = GPT(config, load_ops("torch", head_width=config.head_width, dtype=torch.float32, device="cpu"))
    model = ReferenceGPT(ReferenceConfig(vocab_size=config.vocab_size, norm=norm, **SHAPE))
    model.load_state_dict(ours.state_dict())
    windows = Windows(dataset, SHAPE["seq_len"], sampler="epoch", seed=SEED)
    batches = (torch.from_numpy(windows.batch(range(8 * step, 8 * step + 8))) for step in range(STEPS))
    return reference_train(model, batches, lr=LR, warmup=WARMUP, total=STEPS, weight_decay=0.01)


@pytest.mark.parametrize(
    ("stage", "ranks", "micro", "accumulation", "model"),
    [
        (0, 1, 8, 1, "tiny"),
        (0, 2, 2, 2, "tiny"),
        (1, 1, 4, 2, "tiny"),
        (1, 2, 4, 1, "gpt1"),
        (2, 1, 2, 4, "gpt1"),
        (2, 2, 2, 2, "tiny"),
        (3, 1, 8, 1, "tiny"),
        (3, 2, 1, 4, "gpt1"),
    ],
)
def test_losses_are_those_of_the_plain_loop(tmp_path, stage, ranks, micro, accumulation, model):
    config = tmp_path / "ds.json"
    config.write_text(
        json.dumps(
            {
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": accumulation,
                "zero_optimization": {"stage": stage},
            }
        )
    )
    shape = [word for name, value in SHAPE.items() for word in (f"--{name}", value)]
    codes, output = train(
        [
            *["--ds_config", config, "--model", model, *shape, "--dropout", 0, "--data", tiny_corpus()],
            *["--run_dir", tmp_path / "run", "--max_steps", STEPS, "--warmup_steps", WARMUP, "--lr", LR],
            *["--min_lr", 0, "--seed", SEED, "--log_interval", 1],
        ],
        ranks,
    )
    assert codes == [0] * ranks, output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    expected = reference_losses("post" if model == "gpt1" else "pre")
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0] - 0.5, "the model has to learn for the comparison to mean anything"


def test_an_evaluation_is_the_same_however_the_batch_is_cut(tmp_path):
    """--eval_steps counted the batches of each rank: more ranks or less accumulation measured other text."""
    losses = []
    for ranks, micro, accumulation in ((1, 4, 1), (1, 1, 4), (2, 2, 1)):
        config, run_dir = tmp_path / "ds.json", tmp_path / f"run{len(losses)}"
        batch = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
        config.write_text(json.dumps(batch))
        shape = [word for name, value in SHAPE.items() for word in (f"--{name}", value)]
        data = ["--data", tiny_corpus(), "--valid_data", f"v={tiny_corpus()}-valid", "--eval_steps", 3]
        codes, output = train(
            ["--ds_config", config, "--model", "tiny", *shape, *data, "--run_dir", run_dir, "--max_steps", 1], ranks
        )
        assert codes == [0] * ranks, output
        losses.append(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])["valid/v/loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-5)
