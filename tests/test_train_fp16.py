"""fp16 and its loss scale. A CPU is refused for being slow at it, not for being wrong: here it is let through."""

import functools
import json
import tempfile
from pathlib import Path

import pytest
from checkpoint_common import stopped_after
from corpora import tiny_corpus
from distributed import run_ranks
from several_runs import let_fp16_through

STAGES = [0, 1, 2, 3]


def _train_in_fp16(argv):
    from megagpt.train.main import main

    let_fp16_through()
    return main(argv)


def train(folder: Path, stage: int, run: str, *, max_steps=6, ranks=2, **fp16) -> tuple[list[int], str, list[dict]]:
    """Exit codes, output and training records of a run of ``max_steps`` steps."""
    config = folder / "ds.json"
    scale = {"enabled": True, "hysteresis": 1, **fp16}
    config.write_text(json.dumps({"fp16": scale, "zero_optimization": {"stage": stage}}))
    shape = ["--n_layer", 1, "--d_model", 32, "--n_head", 2, "--seq_len", 16, "--micro_batch_size", 2]
    words = ["--ds_config", config, "--model", "tiny", *shape, "--data", tiny_corpus(), "--kernels", "torch"]
    words += ["--run_dir", folder / run, "--max_steps", max_steps, "--save_interval", 1, "--keep_last", 9]
    words += ["--log_interval", 1, "--warmup_steps", 2, "--lr", 1e-3, "--dropout", 0]
    results = run_ranks(_train_in_fp16, ranks, [str(word) for word in words])
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "lr" in record]
    return [code for code, _ in results], "".join(output for _, output in results), records


@pytest.mark.parametrize("stage", STAGES)
def test_steps_that_overflow_lower_the_scale_and_leave_the_schedule_where_it_was(tmp_path, stage):
    """A scale of 2^30 overflows; it is halved until nothing does, and only then the warm-up begins."""
    codes, output, records = train(tmp_path, stage, "run", max_steps=20, initial_scale_power=30)
    assert codes == [0, 0], output
    n = next(i for i, record in enumerate(records) if record["skipped_steps"] == i)  # leading steps that overflow
    assert 3 < n < 16
    assert [r["loss_scale"] for r in records[: n + 1]] == [2.0**29 / 2**i for i in range(n)] + [2.0**30 / 2**n]
    assert [r["lr"]["decay"] for r in records[: n + 2]] == [0.0] * (n + 1) + [5e-4]
    assert [r["grad_norm"] for r in records[:n]] == [None] * n
    # What is shown is the norm of the gradients, not of the scaled ones, which are over ten thousand times larger.
    assert 0.01 < records[n]["grad_norm"] < 100
    assert {r["nan_steps"] for r in records} == {0}


@functools.cache
def _fp32_losses(steps: int) -> list[float]:
    """The same run in fp32, where nothing is scaled."""
    with tempfile.TemporaryDirectory() as folder:
        codes, output, records = train(Path(folder), 1, "run", max_steps=steps, enabled=False)
    assert codes == [0, 0], output
    return [record["loss"] for record in records]


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_fp32_up_to_rounding(tmp_path, stage):
    """Without ZeRO the gradients were divided by a scale that nobody had multiplied the loss with."""
    codes, output, records = train(tmp_path, stage, "run", max_steps=30, initial_scale_power=10)
    assert codes == [0, 0], output
    assert records[-1]["skipped_steps"] == 0
    assert [record["loss"] for record in records] == pytest.approx(_fp32_losses(30), abs=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_repeats_the_uninterrupted_one_scale_included(tmp_path, stage):
    scale = {"initial_scale_power": 24, "loss_scale_window": 2}
    keep = ("step", "loss", "lr", "grad_norm", "loss_scale", "skipped_steps")

    def curve(records):
        return [{key: record[key] for key in keep} for record in records]

    codes, output, whole = train(tmp_path, stage, "run", max_steps=12, **scale)
    assert codes == [0, 0], output
    stopped_after(tmp_path / "run", tmp_path / "stopped", 7)
    codes, output, resumed = train(tmp_path, stage, "stopped", max_steps=12, **scale)
    assert codes == [0, 0], output
    assert "step 7 of 12" in output
    assert curve(resumed) == curve(whole)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_scale_with_nowhere_left_to_go_ends_the_run(tmp_path, stage):
    """Without ZeRO DeepSpeed itself goes on for ever."""
    codes, output, _ = train(
        tmp_path, stage, "run", max_steps=60, ranks=1, initial_scale_power=33, min_loss_scale=2**32
    )
    assert codes == [6], output
    assert output.count("error:") == 1
    assert "Traceback" not in output
