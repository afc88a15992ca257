"""The batch scripts on a real Slurm of two nodes: what a user types, and what becomes of it when things go wrong."""

import json
import os
import re
import signal
import sys
import time

import pytest
from slurm_common import SAVE_EVERY, STEPS, arguments, curve, last_step, ranks, reach, restart, submit, write_config

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def whole(cluster, folder):
    """The folder of a run that nothing disturbed."""
    run_dir = folder / "whole"
    job = submit(cluster, folder, "pretrain.sbatch", *arguments(folder, run_dir))
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    return run_dir


def test_a_job_on_two_nodes_runs_to_its_end(cluster, whole):
    run = json.loads((whole / "run.json").read_text())
    assert run["starts"][-1]["world_size"] == 2
    assert [step for step, *_ in curve(whole)] == list(range(1, STEPS + 1))
    assert not cluster.processes()


def test_a_run_that_is_preempted_and_cancelled_ends_as_if_nothing_had_happened(cluster, folder, whole):
    run_dir = folder / "preempted"
    words = arguments(folder, run_dir)
    job = submit(cluster, folder, "pretrain.sbatch", *words)
    reach(cluster, job, run_dir, 25)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={folder}/urgent.out", "--wrap", "true")
    first = cluster.sbatch(*urgent, cwd=folder)  # the job that runs gets USR1, as before its time limit
    restart(cluster, job, 1)
    assert cluster.wait(first) == "COMPLETED"
    reach(cluster, job, run_dir, 55)
    saved = last_step(run_dir)
    cluster.ask("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    output = cluster.output(job)
    assert re.search(r"stopped after step \d+ \(SIGUSR1", output), output
    assert "goes back into the queue (code 75)" in output
    assert "was told to end (code 75)" in output
    newest = max(int(path.name[11:]) for path in (run_dir / "checkpoints").glob("global_step*"))
    assert newest >= saved > 50  # TERM, too, was answered with a checkpoint
    assert not cluster.processes()

    again = submit(cluster, folder, "pretrain.sbatch", *words)
    assert cluster.wait(again) == "COMPLETED", cluster.output(again)
    assert curve(run_dir) == curve(whole)  # every step once and in its order, and its numbers
    assert len(json.loads((run_dir / "run.json").read_text())["starts"]) == 3
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["starts"], summary["steps_lost"], summary["steps"]) == (3, 0, STEPS)
    assert summary["downtime_seconds"] > 0
    assert 0 < summary["goodput"] < 1


def test_a_run_that_loses_a_rank_and_a_node_ends_as_if_nothing_had_happened(cluster, folder, whole):
    run_dir = folder / "broken"
    job = submit(cluster, folder, "pretrain.sbatch", *arguments(folder, run_dir))
    reach(cluster, job, run_dir, 15)
    os.kill(ranks(cluster, job)[1], signal.SIGKILL)
    restart(cluster, job, 1)
    reach(cluster, job, run_dir, 45)
    cluster.kill_node("n2")
    cluster.until(lambda: not ranks(cluster, job), 120, "the end of the ranks", lambda: cluster.output(job))
    cluster.start_node("n2")
    cluster.wait_for_nodes("n2")
    time.sleep(4)  # Slurm itself waits for minutes, and is not done with a node that has just come back
    restart(cluster, job, 2)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert "a rank has ended without a word, or never came (code 4)" in cluster.output(job)
    assert curve(run_dir) == curve(whole)
    summary = json.loads((run_dir / "summary.json").read_text())
    # Slurm at times ends the start after a lost node once more, which saves and goes on.
    assert summary["starts"] in (3, 4)
    assert summary["steps_lost"] <= 2 * SAVE_EVERY
    assert not cluster.processes()


def test_a_mistake_is_told_once_and_not_repeated(cluster, folder):
    job = submit(cluster, folder, "pretrain.sbatch", *arguments(folder, folder / "mistaken", "--lerning_rate", 1))
    assert cluster.wait(job) == "FAILED"
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert cluster.output(job).count("error: unknown flag --lerning_rate") == 1


def test_a_run_that_never_gets_anywhere_is_given_up(cluster, folder):
    """A rank that dies at once, three times in a row."""
    python = folder / "dies"
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    python.chmod(0o755)
    flags = ("--nodes=1", "--ntasks-per-node=2")
    job = submit(cluster, folder, "pretrain.sbatch", "--run_dir", folder / "hopeless", flags=flags, PYTHON=str(python))
    restart(cluster, job, 1)
    restart(cluster, job, 2)
    assert cluster.wait(job) == "FAILED"
    assert cluster.output(job).count("a rank has ended without a word, or never came (code 137)") == 3
    assert "3 starts in a row have left no new checkpoint" in cluster.output(job)


def test_the_runs_of_an_array_share_a_node(cluster, folder):
    """Both at once, each with two ranks on the same host, and each with its line of the sweep."""
    sweep = folder / "sweep.txt"
    sweep.write_text("--lr 1e-3 --seed 1\n--lr '3e-4' --seed 2\n")
    flags = ("--array=1-2", "--nodes=1", "--ntasks-per-node=2", "--nodelist=n1")
    words = arguments(folder, folder / "sweep", "--max_steps", 3)
    first = submit(cluster, folder, "array.sbatch", *words, flags=flags, SWEEP=str(sweep))
    tasks = [f"{first}_{i}" for i in (1, 2)]
    assert [cluster.wait(task) for task in tasks] == ["COMPLETED"] * 2, [cluster.output(task) for task in tasks]
    runs = [json.loads((folder / "sweep" / str(i) / "run.json").read_text()) for i in (1, 2)]
    assert [run["settings"]["lr"] for run in runs] == [1e-3, 3e-4]
    assert [run["settings"]["seed"] for run in runs] == [1, 2]
    assert [run["starts"][-1]["world_size"] for run in runs] == [2, 2]
    times = [(job["StartTime"], job["EndTime"]) for job in map(cluster.job, tasks)]
    assert max(begun for begun, _ in times) < min(ended for _, ended in times)  # at the same time


def test_a_host_that_fails_the_preflight_is_left_out_of_the_next_start(cluster, folder):
    """On n1 no file can grow beyond 64 kB: its part of the disk is as good as broken."""
    python = folder / "limited"
    python.write_text(
        f'#!/bin/bash\nif [ "$SLURMD_NODENAME" = n1 ]; then ulimit -f 64; fi\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    run_dir = folder / "elsewhere"
    words = arguments(folder, run_dir, "--max_steps", 2, "--preflight")
    job = submit(
        *(cluster, folder, "pretrain.sbatch", *words),
        flags=["--nodes=1", "--exclude=n3"],
        PYTHON=str(python),
        MEGAGPT_EXCLUDE="1",
    )
    restart(cluster, job, 1)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert "preflight: going on without n1: OSError: File too large" in cluster.output(job)
    assert cluster.job(job)["ExcNodeList"] == "n3,n1"  # what its user has excluded stays
    assert cluster.job(job)["BatchHost"] == "n2"
    assert last_step(run_dir) == 2
