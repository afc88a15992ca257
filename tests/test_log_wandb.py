"""What reaches Weights & Biases. Its library is no dependency; a stand-in keeps the library's rule about steps."""

import json
import sys

import pytest
from checkpoint_common import arguments
from distributed import run_ranks, train_main

from megagpt.train import wandb_run

# As wandb 0.31 does: what comes at a step below the last one's is ignored, with a warning.
STAND_IN = """
import json, os
_last = -1
def _note(line):
    with open(os.path.join(os.path.dirname(__file__), "calls.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\\n")
def init(project=None, group=None, entity=None):
    _note({name: os.environ.get(name) for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_NAME", "WANDB_DIR")})
def finish():
    global _last
    _last = -1
def log(data, step=None, commit=None):
    global _last
    if step >= _last:
        _last = step
        _note({"step": step, **data})
"""


def _train_with(folder, argv):
    sys.path.insert(0, str(folder))
    return train_main(argv)


def runs_and_points(folder, run_dir, steps):
    """What the stand-in was told at its start, and {tag: [step, ...]} that it kept of a run up to ``steps``."""
    (folder / "wandb.py").write_text(STAND_IN)
    config = folder / "ds.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "wandb": {"enabled": True, "project": "p"}}))
    argv = [str(word) for word in arguments(run_dir, ds_config=config, max_steps=steps)]
    ((code, output),) = run_ranks(_train_with, 1, folder, argv)
    assert code == 0, output
    lines = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    points = {}
    for line in lines:
        for tag in line.keys() - {"step"} if "step" in line else ():
            points.setdefault(tag, []).append(line["step"])
    return [line for line in lines if "step" not in line], points


def test_all_curves_arrive_and_a_resumed_run_is_the_same_run_there(tmp_path):
    """Classic tags over samples, sent between those over steps, made the library ignore nearly all of the latter."""
    run_dir = tmp_path / "run"
    runs_and_points(tmp_path, run_dir, 3)
    (first, second), points = runs_and_points(tmp_path, run_dir, 5)
    assert points["train/loss"] == points["perf/step_ms"] == points["Train/Samples/lr"] == [1, 2, 3, 4, 5]
    assert points["train/samples"] == [1, 2, 3, 4, 5]
    assert first == second
    assert first["WANDB_RUN_ID"] == (run_dir / "wandb_run_id").read_text().strip()
    assert (first["WANDB_RESUME"], first["WANDB_NAME"], first["WANDB_DIR"]) == ("allow", "run", str(run_dir))


def test_a_run_from_its_beginning_is_a_new_one_there_unless_the_user_says_which(tmp_path):
    def told(resumed, env=None, **own):
        env = own if env is None else env
        wandb_run.announce(tmp_path, {"wandb": {"enabled": True}}, resumed=resumed, env=env)
        return env["WANDB_RUN_ID"]

    first = told(False)
    assert told(True) == first
    env = {}
    ids = {told(False, env=env) for _ in range(2)}  # runs of several seeds in one process
    assert len(ids) == 2
    assert told(False) != first
    assert told(False, WANDB_RUN_ID="mine") == told(True) == "mine"
    (tmp_path / "wandb_run_id").write_bytes(b"\xff\x00")
    assert len(told(True)) == 16


def test_without_its_section_nothing_is_set_or_written(tmp_path):
    env = {}
    wandb_run.announce(tmp_path, {"wandb": {"enabled": False}}, resumed=False, env=env)
    assert not env
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fails", ["monitor", "wandb"])
def test_one_that_fails_does_not_take_the_other_with_it(tmp_path, capsys, fails):
    from test_log_metrics import training_record

    from megagpt.train.log import RunLog

    reached = []

    class Monitor:
        wandb_monitor = type("Wandb", (), {"log": lambda self, data, step: note("wandb", step)})()

        def write_events(self, events):
            note("monitor", events[0][2])

    def note(who, step):
        if who == fails:
            raise ConnectionError("the service is gone")
        reached.append((who, step))

    with RunLog(tmp_path, total_steps=9, is_main=True, monitor=Monitor()) as log:
        log.train(training_record(1))
        log.train(training_record(2))
    other = {"monitor": "wandb", "wandb": "monitor"}[fails]
    assert reached == [(other, 1), (other, 2)]
    assert capsys.readouterr().out.count("failed and is off from here on (the service is gone)") == 1
