"""What the starts of a run cost, and that a job which gets nowhere is not requeued for ever."""

import json
import os
import time

import pytest
from checkpoint_common import arguments
from corpora import tiny_corpus
from fork_server import train

from megagpt.errors import ConfigError
from megagpt.train import metrics, restarts

REQUEUED = {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_ID": "7"}


def logged(run_dir, *steps, at):
    (run_dir / metrics.NAME).write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    os.utime(run_dir / metrics.NAME, (at, at))


def test_steps_lost_downtime_and_goodput(tmp_path, monkeypatch):
    """Three starts: killed at step 17 with a checkpoint of 10, stopped in order at 25, then to the end."""
    now = 1000.0
    monkeypatch.setattr(restarts.time, "time", lambda: now)
    restarts.begin(tmp_path, 0, None, {})
    logged(tmp_path, 1, 17, at=1060.0)
    now = 1090.0
    restarts.begin(tmp_path, 10, None, {})
    logged(tmp_path, 1, 10, 25, at=1150.0)
    now = 1160.0
    restarts.begin(tmp_path, 25, None, {})
    now = 1200.0
    expected = {"starts": 3, "steps_lost": 7, "downtime_seconds": 40.0, "goodput": 0.6}
    assert restarts.figures(tmp_path, 120.0, 40) == expected
    logged(tmp_path, 1, 10, 25, 40, at=1200.0)
    for _ in range(2):  # the finished run is started again: nothing was lost meanwhile
        now += 3600.0
        restarts.begin(tmp_path, 40, None, {})
        assert restarts.figures(tmp_path, 120.0, 40) == expected


@pytest.mark.parametrize(("limit", "env", "allowed"), [(None, REQUEUED, 3), (2, {}, 2), (2, REQUEUED, 2)])
def test_the_start_that_would_be_in_vain_again_is_refused(limit, env, allowed, tmp_path):
    for _ in range(allowed):
        restarts.begin(tmp_path, 40, limit, env)
    with pytest.raises(ConfigError, match=f"the last {allowed} starts of .* all began at step 40"):
        restarts.begin(tmp_path, 40, limit, env)
    restarts.begin(tmp_path, 41, limit, env)  # there is a new checkpoint


def test_a_person_may_start_as_often_as_it_takes(tmp_path):
    for _ in range(9):
        restarts.begin(tmp_path, 40, None, {})
        restarts.begin(tmp_path, 40, 0, REQUEUED)


def test_a_run_that_starts_anew_forgets_what_an_earlier_one_cost(tmp_path):
    restarts.begin(tmp_path, 0, None, {})
    restarts.begin(tmp_path, 30, None, {})
    restarts.begin(tmp_path, 0, None, {})
    assert [start["step"] for start in restarts.read(tmp_path)] == [0]


def test_a_file_that_cannot_be_read_is_no_history(tmp_path):
    for text in ("", "{}", "[1]", "[" * 100_000):
        (tmp_path / restarts.NAME).write_text(text)
        assert restarts.read(tmp_path) == []


def test_the_summary_tells_what_restarts_cost(tmp_path):
    run_dir = tmp_path / "run"
    with train(arguments(run_dir, max_steps=100000, save_interval=20), 1) as job:
        job.wait_for("iteration       45/")
        job.processes[0].kill()
        assert job.wait() == [-9]
    saved = restarts.read(run_dir)[0]["step"]
    assert saved == 0
    begun = time.time()
    with train(arguments(run_dir, max_steps=400, save_interval=0), 1) as job:
        assert job.wait() == [0], job.output()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["starts"] == 2
    assert summary["steps_lost"] >= 5
    assert 0 < summary["downtime_seconds"] < time.time() - begun
    assert 0 < summary["goodput"] < 1
    told = (run_dir / "summary.md").read_text()
    assert "| steps_lost |" in told
    size = json.loads((run_dir / "run.json").read_text())["n_params"]
    assert f"| model | tiny |\n| n_params | {size:,} |" in told
    assert f"| data | {tiny_corpus()} |" in told
    steps = [record["step"] for record in metrics.read(run_dir / metrics.NAME) if "loss" in record]
    assert steps == list(range(1, 401))  # no overlap and no gap
