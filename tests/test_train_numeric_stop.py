"""Updates that are not finite are skipped on all ranks, and a run that has only such ones stops with code 6."""

import json

import pytest
from checkpoint_common import arguments
from fork_server import Job, train_main

from megagpt.train import metrics


def poisoned(steps, kind, argv):
    """``train.py`` whose rank 1 has a loss or a gradient that is not a number in the ``steps``."""
    import os

    from megagpt.train import engine, loop

    backward, state = engine.backward, {}
    step_of = loop.Loop._step

    def remembering(self):
        state["step"] = self.state.step + 1
        return step_of(self)

    def broken(deepspeed_engine, loss):
        if os.environ["RANK"] == "1" and (state["step"] in steps or state["step"] >= steps[-1]):
            loss = loss * float(kind)
        backward(deepspeed_engine, loss)

    loop.Loop._step, engine.backward = remembering, broken
    return train_main(argv)


@pytest.mark.parametrize(
    ("stage", "precision", "kind"),
    [(0, "fp32", "nan"), (0, "bf16", "nan"), (2, "bf16", "inf"), (3, "fp32", "nan")],
)
def test_one_is_skipped_and_ten_in_a_row_stop_the_run(stage, precision, kind, tmp_path):
    run_dir = tmp_path / "run"
    flags = {"stage": stage, "precision": precision, "max_steps": 100, "save_interval": 2, "keep_last": 2}
    with Job(poisoned, (3, 9), kind, [str(w) for w in arguments(run_dir, **flags)]) as job:
        codes, output = job.wait(), job.output()
    assert codes == [6, 6], output
    records = {r["step"]: r for r in metrics.read(run_dir / "metrics.jsonl")}
    assert [records[step]["skipped_steps"] for step in (2, 3, 4, 8, 9, 10)] == [0, 1, 1, 1, 2, 3]
    assert records[8]["loss"] < 6  # the weights were left alone in step 3
    assert "step 18: 10 updates in a row had gradients that are not finite" in output
    # What was saved before the trouble is still there, and nothing of it.
    assert sorted(int(p.name[11:]) for p in (run_dir / "checkpoints").glob("global_step*")) == [6, 8]
    told = json.loads((run_dir / "numeric_stop.json").read_text())
    assert told["reason"].startswith("step 18: 10 updates in a row")
    assert [rank["parameters_not_finite"] for rank in told["ranks"]] == [[], []]
    steps = told["ranks"][1]["last_steps"]
    assert [s["skipped"] for s in steps] == [s["step"] == 3 or s["step"] >= 9 for s in steps]
    assert steps[-1]["samples"] == [68, 71]


def test_many_among_the_last_hundred_stop_the_run_too(tmp_path):
    steps = (*range(3, 300, 3), 10**9)
    with Job(poisoned, steps, "nan", [str(w) for w in arguments(tmp_path / "run", max_steps=100)]) as job:
        assert job.wait() == [6, 6]
        assert "step 90: 30 of the last 100 updates had gradients" in job.output()
