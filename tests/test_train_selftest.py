"""``megagpt selftest resume``: it passes where a run goes on exactly, and would notice where it does not."""

import json
import os

import pytest
from checkpoint_common import flip_a_bit
from fork_server import train

from megagpt.cli import main
from megagpt.errors import NumericError
from megagpt.train import faults, selftest


@pytest.fixture
def quick_starts(monkeypatch):
    """Ranks are forked and not started by ``megagpt launch``, which takes ten seconds; the code is as its own."""

    class Done:
        def __init__(self, command, env):
            script = next(i for i, word in enumerate(command) if word.endswith("train.py"))
            ranks = int(command[command.index("--num_gpus") + 1])
            with train(command[script + 1 :], ranks, env={faults.VARIABLE: env.get(faults.VARIABLE)}) as job:
                codes = job.wait()
            self.returncode = 128 + 9 if -9 in codes else max(codes)

    monkeypatch.setattr(selftest.subprocess, "run", Done)


def test_a_run_that_is_killed_and_resumed_is_found_to_be_the_one_that_was_not(tmp_path, quick_starts, capsys):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    home = tmp_path / "runs"
    own = ["--ds_config", config, "--run_dir", home, "--num_gpus", 2, "--steps", 4]
    more = ["--", "--d_model", 32, "--n_head", 2, "--global_batch_size", 4, "--dropout", 0.1]
    assert main(["selftest", "resume", *map(str, [*own, *more])]) == 0
    shown = capsys.readouterr().out
    assert "killed (-9, rank 1) in the save of step 2]" in shown
    assert "resume is exact on 2 ranks: 4 steps, and " in shown

    whole, killed = home / "uninterrupted", home / "killed"
    ours, theirs = (selftest.metrics.read(run / "metrics.jsonl") for run in (whole, killed))
    theirs[-1]["loss"] += 1e-7
    with pytest.raises(NumericError, match=r"step 4: loss is [\d.]+ in the uninterrupted run and "):
        selftest._compare_logs(ours, theirs, 4)
    with pytest.raises(NumericError, match=r"the killed run has steps \[1, 2, 2, 3, 4\]"):
        selftest._compare_logs(ours, [*theirs[:2], *theirs[1:]], 4)
    last = "checkpoints/global_step4"
    flip_a_bit(next((killed / last).glob("*rank_1*optim_states.pt")))
    with pytest.raises(NumericError, match="of the last checkpoint differ"):
        selftest._compare_checkpoints(whole / last, killed / last)
    with pytest.raises(NumericError, match=r"began at steps \[0, 1\] and not at 0 and 2"):
        selftest._check_went_on(killed, 2)


def test_a_run_that_fails_for_its_own_reasons_ends_the_test_with_its_code(tmp_path, quick_starts, capsys):
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimisation": {}}')
    assert main(["selftest", "resume", "--ds_config", str(config), "--num_gpus", "1"]) == 2
    assert "ended with code 2 instead of 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resum"], "did you mean 'resume'"),
        (["resume", "--ds_config", "x", "--", "--max_steps=4"], "--max_steps after -- is what the test itself sets"),
        (["resume", "--ds_config", "x", "--", "--train-iters", "4"], "--max_steps after -- is what the test itself"),
        (["resume", "--ds_config", "x", "--", "--mirror", "m"], "--mirror after -- would be one folder for both runs"),
        (["resume", "--ds_config", "x", "--steps", "2"], "give 3 or more"),
        (["resume", "--ds_config", "x", "--run_dir", os.path.dirname(__file__)], "is not empty"),
    ],
    ids=["kind", "own flag", "own by another name", "mirror", "steps", "folder"],
)
def test_mistakes_are_told_in_a_sentence(words, told, capsys):
    assert main(["selftest", *words]) == 2
    assert told in capsys.readouterr().err
