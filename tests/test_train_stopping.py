"""A run that is asked to stop saves between two steps, ends with code 75 and goes on as if nothing had been."""

import json
import os
import signal
import time
from datetime import datetime
from pathlib import Path

import finetune_common
import pytest
from checkpoint_common import arguments
from fork_server import Job, finetune, train, train_main

from megagpt.config.shared import stop_signal
from megagpt.train.stopping import NOTHING, SAVE, STOP, StopRequests, listening

LONG = {"max_steps": 100000, "save_interval": 0, "log_interval": 20}


def newest(run_dir: Path) -> int:
    return max((int(path.name[11:]) for path in (run_dir / "checkpoints").glob("global_step*")), default=0)


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def stopped_by(ask, run_dir: Path, *, ranks=2, env=None, **changes) -> str:
    """The output of a long run that ``ask(job)`` makes stop, which has to save where it stops."""
    with train(arguments(run_dir, **{**LONG, **changes}), ranks, env) as job:
        ask(job)
        codes, output = job.wait(), job.output()
    assert codes == [75] * ranks, output
    assert output.count(f"stopped after step {newest(run_dir)} (") == 1, output
    assert "the same command goes on from there" in output
    assert not list((run_dir / "checkpoints").glob(".tmp*"))
    return output


def sends(number, *ranks, times=1, after="iteration"):
    def ask(job):
        job.wait_for(after)
        for _ in range(times):
            job.send(number, *ranks)

    return ask


@pytest.mark.parametrize(
    ("ask", "changes"),
    [
        (sends(signal.SIGUSR1, 0), {}),
        (sends(signal.SIGTERM), {}),
        (sends(signal.SIGTERM, 1, times=50), {}),
        (sends(signal.SIGUSR2, 1), {"exit_signal": "SIGUSR2"}),
    ],
    ids=["USR1 to rank 0", "TERM to all", "TERM again and again", "--exit_signal"],
)
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(ask, changes, tmp_path):
    stopped_by(ask, tmp_path / "run", **changes)
    assert newest(tmp_path / "run") > 0


def test_a_signal_in_setup_stops_before_the_first_step(tmp_path):
    output = stopped_by(sends(signal.SIGTERM, 1, after="run folder"), tmp_path / "run", log_interval=1000)
    assert "SIGTERM on rank 1" in output


def saving_slowly(argv):
    """``train.py`` that tells when it is in the middle of a save, and stays there for a second."""
    from megagpt.train import checkpoint

    finish = checkpoint._finish_rank

    def slow(*args):
        print("in a save", flush=True)
        time.sleep(1.0)
        return finish(*args)

    checkpoint._finish_rank = slow
    return train_main(argv)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_in_a_save_leaves_it_whole(number, tmp_path):
    """Ctrl-C does not wait for it, and leaves nothing that looks like a checkpoint."""
    argv = arguments(tmp_path / "run", max_steps=1000, save_interval=5)
    with Job(saving_slowly, [str(word) for word in argv]) as job:
        job.wait_for("in a save", rank=0)
        job.wait_for("in a save", rank=1)
        job.send(number)
        codes, output = job.wait(), job.output()
    if number == signal.SIGINT:
        assert set(codes) <= {130, 4}, output
        assert newest(tmp_path / "run") == 0
    else:
        assert codes == [75, 75], output
        assert newest(tmp_path / "run") == 5
        assert output.count("saved ") == 1
        assert "stopped after step 5 (" in output


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path):
    flags = {"max_steps": 100, "save_interval": 0, "log_interval": 1, "stage": 2}
    for name in ("whole", "parts"):
        with train(arguments(tmp_path / name, **flags)) as job:
            if name == "parts":
                sends(signal.SIGUSR1, 1)(job)
            codes = job.wait()
            assert codes == ([75, 75] if name == "parts" else [0, 0]), job.output()
    assert 0 < newest(tmp_path / "parts") < 100
    with train(arguments(tmp_path / "parts", **flags)) as job:
        assert job.wait() == [0, 0], job.output()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_fine_tuning_stops_and_goes_on_too(tmp_path):
    home = finetune_common.folder()
    files = ["--train", finetune_common.write_csv(home / "long.csv", 96), "--valid", home / "long.csv"]
    start = ["--init_from", finetune_common.pretrained(), "--run_dir", tmp_path / "run", "--log_interval", 1]
    more = ["--epochs", 4, "--preflight", "warn"]
    argv = ["--ds_config", finetune_common.ds_config(home, 1), *files, *start, *more]
    with finetune(argv) as job:
        job.wait_for("iteration        4/")
        job.send(signal.SIGUSR1, 1)
        assert job.wait() == [75, 75], job.output()
        assert f"stopped after step {newest(tmp_path / 'run')} (SIGUSR1 on rank 1)" in job.output()
        assert job.output().count("preflight: 1 host, 2 ranks") == 1
    with finetune(argv) as job:
        assert job.wait() == [0, 0], job.output()
    assert list(losses(tmp_path / "run")) == list(range(1, 13))


def test_files_in_the_run_folder_save_and_stop(tmp_path):
    run_dir = tmp_path / "run"

    def ask(job):
        job.wait_for("iteration")
        (run_dir / "save").touch()
        job.wait_for("saved")
        assert not (run_dir / "save").exists()
        (run_dir / "stop").touch()

    stopped_by(ask, run_dir)
    assert len(list((run_dir / "checkpoints").glob("global_step*"))) == 2
    with train(arguments(run_dir)) as job:  # as the next start of a requeued job
        assert job.wait() == [2, 2]
        assert "stop says that this run is to stand still; remove it to go on" in job.output()


def test_a_run_stops_by_itself_when_its_time_is_up(tmp_path):
    """Slurm's signal can come too early, late or never: the run asks when its job ends."""
    end = datetime.fromtimestamp(time.time() + 35).isoformat(timespec="seconds")
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n[ $3 = 77 ] && echo {end}\n")
    (tmp_path / "squeue").chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    assert "(the job ends at " in stopped_by(lambda job: None, tmp_path / "job", env=env)
    output = stopped_by(lambda job: None, tmp_path / "own", ranks=1, exit_duration_in_mins=0.02)
    assert "(--exit_duration_in_mins 0.02)" in output


# without a process group --------------------------------------------------------------------------------------------


@pytest.fixture
def requests(tmp_path):
    made = StopRequests()
    made._run_dir = tmp_path
    return made


@pytest.mark.parametrize(("soon", "level"), [(0.0, NOTHING), (20.0, STOP)])
def test_what_comes_before_the_next_boundary_is_allowed_for(requests, soon, level):
    """30 seconds of margin and 5 of a save end before the 45th; an evaluation of 20 does not."""
    requests.saved(5.0)
    requests.saved(1.0)
    requests._job_end.time = time.time() + 45
    assert requests.agree("cpu", soon=soon) == level


def test_a_checkpoint_that_is_yet_to_be_written_is_expected_to_take_its_time(requests):
    requests._job_end.time = time.time() + 45
    assert requests.agree("cpu", checkpoint_bytes=int(2e9)) == STOP


def test_short_steps_are_not_all_followed_by_an_agreement(requests):
    (requests._run_dir / "save").touch()
    assert requests.agree("cpu") == SAVE
    requests._signal = signal.SIGTERM
    levels = [requests.agree("cpu") for _ in range(1000)]
    assert levels[0] == STOP  # the first tells how long a step takes
    assert levels[1:100] == [NOTHING] * 99


def test_forked_workers_and_later_programs_do_not_inherit_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    with listening() as requests:
        worker = os.fork()
        if worker == 0:
            os._exit(int(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL))
        assert os.waitpid(worker, 0)[1] == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests._signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_has_stopped_ignores_what_follows():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with listening() as requests:
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.agree("cpu") == STOP
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, before)


def test_signals_by_name():
    assert stop_signal("USR2") == stop_signal("sigusr2") == signal.SIGUSR2
    assert [stop_signal(name) for name in ("KILL", "INT", "SIG", "", "USR3", "SEGV")] == [None] * 6
