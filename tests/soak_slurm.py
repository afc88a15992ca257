"""Every way in which Slurm asks a job to stop, one after the other; half an hour, by ``make slurm-soak``."""

import json
import os
import statistics

import pytest
from slurm_common import arguments, curve, last_step, reach, restart, submit, write_config

pytestmark = pytest.mark.timeout(900)

LONG = 150.0  # seconds that a run takes without a pause: Slurm's signals come within the first two minutes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def long_run(cluster, folder):
    """The curve of an uninterrupted run, and how to start one like it; SOAK_STEPS may say how long it is."""

    def start(name: str, *flags: str, steps: int = 0) -> tuple[str, object]:
        run_dir = folder / name
        words = arguments(folder, run_dir, "--max_steps", steps or long, "--save_interval", 200)
        return submit(cluster, folder, "pretrain.sbatch", *words, flags=flags), run_dir

    long = int(os.environ.get("SOAK_STEPS", "0"))
    if not long:  # so many as this machine makes in that time, with whatever else it does
        job, run_dir = start("pace", steps=100)
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)
        paces = [json.loads(line)["step_ms"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        long = int(1e3 * LONG / statistics.mean(paces[20:]))
    job, run_dir = start("long")
    assert cluster.wait(job, 600) == "COMPLETED", cluster.output(job)
    return curve(run_dir), start


# (flags of sbatch, what is done to the running job, what its log then says). Slurm may send the signal before a time
# limit up to a minute early: in a job of a minute even before the ranks have started. Half a minute before the limit
# the ranks would save by themselves.
WAYS = {
    "signal to the batch script": (["--time=2", "--signal=B:USR1@50"], None, "SIGUSR1 on rank"),
    "signal to the ranks": (["--time=2", "--signal=USR1@50"], None, "SIGUSR1 on rank"),
    "time limit without a signal": (["--time=1", "--signal=B:URG@5"], None, "the job ends at"),
    "scancel with a signal": (["--time=15"], ["scancel", "--signal=USR1"], "USR1"),
    "scontrol requeue": (["--time=15"], ["scontrol", "requeue"], "TERM"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_job_that_slurm_stops_ends_as_if_nothing_had_happened(way, cluster, long_run, folder):
    flags, command, reason = WAYS[way]
    expected, start = long_run
    job, run_dir = start(way.replace(" ", "-"), *flags)
    if command:
        reach(cluster, job, run_dir, 100)
        cluster.ask(*command, job)
    restart(cluster, job, 1, timeout=180)
    assert last_step(run_dir) < len(expected)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.wait(job, 600) == "COMPLETED", cluster.output(job)
    assert reason in cluster.output(job)
    assert f"job {job}, start 2" in cluster.output(job)
    assert curve(run_dir) == expected
    assert 1 <= len(json.loads((run_dir / "run.json").read_text())["starts"]) <= 2
