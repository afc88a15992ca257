"""A rank that makes no progress ends the job with code 5 and the stacks of all ranks, wherever it stands still."""

import os
import signal
import time

import pytest
from checkpoint_common import arguments
from corpora import tiny_corpus
from fork_server import Job, train, train_main


def stand_still(fn, when=lambda: True):
    """``fn``, in which rank 1 stops for ever at the first call ``when`` this is so."""

    def standing(*args, **kwargs):
        if os.environ["RANK"] == "1" and when():
            print("standing still", flush=True)
            time.sleep(1000)
        return fn(*args, **kwargs)

    return standing


def hanging(place, argv):
    """``train.py`` whose rank 1 stops for ever in the middle of ``place``."""
    from megagpt.train import batches, checkpoint, run

    owner, name = {
        "setup": (run, "seed_all"),
        "evaluation": (run.perplexity, "evaluate"),
        "save": (checkpoint, "_finish_rank"),
        "data": (batches.MicroBatches, "_fetch"),
    }[place]
    calls = iter(range(1000))
    setattr(owner, name, stand_still(getattr(owner, name), lambda: place != "data" or next(calls) == 5))
    return train_main(argv)


PLACES = {
    "setup": "in setup",
    "data": "in step 6",
    "evaluation": "in evaluation",
    "save": "in the save after step 3",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_hang_ends_all_ranks_with_their_stacks(place, tmp_path):
    more = {"valid_data": f"held={tiny_corpus()}-valid", "eval_steps": 1} if place == "evaluation" else {}
    argv = arguments(tmp_path / "run", max_steps=1000, save_interval=3, hang_timeout=3, **more)
    with Job(hanging, place, [str(word) for word in argv]) as job:
        job.wait_for("standing still")
        begun = time.monotonic()
        codes = job.wait(20)
        assert time.monotonic() - begun < 3 + 10
        assert codes == [5, 5], job.output()
        for rank in (0, 1):
            assert f"nothing has moved for 3 s {PLACES[place]}; the stacks" in job.output(rank)
            assert "most recent call first" in job.output(rank)
        assert "in standing" in job.output(1)


def test_a_frozen_rank_ends_its_peers(tmp_path):
    """And when it wakes up it finds them gone. The time that it was frozen is no hang of its own."""
    with train(arguments(tmp_path / "run", max_steps=100000, save_interval=0, hang_timeout=8)) as job:
        job.wait_for("iteration        9/")
        job.send(signal.SIGSTOP, 1)
        job.processes[0].join(30)
        assert job.processes[0].exitcode == 5
        assert "nothing has moved for 8 s in step" in job.output(0)
        job.send(signal.SIGCONT, 1)
        assert job.wait(20) == [5, 4], job.output(1)
        assert "nothing has moved" not in job.output(1)


def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path):
    with train(arguments(tmp_path / "run", max_steps=100000, save_interval=0, hang_timeout=2)) as job:
        job.wait_for("iteration        9/")
        job.send(signal.SIGSTOP)
        time.sleep(4)
        job.send(signal.SIGCONT)
        job.send(signal.SIGUSR1)
        assert job.wait(10) == [75, 75], job.output()


def raising(argv):
    """``train.py`` whose rank 1 has a bug in step 4."""
    from megagpt.train.loop import Loop

    step = Loop._engine_step

    def broken(self):
        if self.state.step == 3 and os.environ["RANK"] == "1":
            raise ValueError("a bug")
        return step(self)

    Loop._engine_step = broken
    return train_main(argv)


def test_an_exception_names_rank_host_and_step_and_ends_the_job(tmp_path):
    argv = [str(word) for word in arguments(tmp_path / "run", max_steps=100000)]
    with Job(raising, argv) as job:
        assert job.wait(30) == [4, 1]
        assert f"rank 1 on {os.uname().nodename} failed in step 4:" in job.output(1)
        assert "ValueError: a bug" in job.output(1)
        assert "stops: another rank has ended" in job.output(0)


def waiting(code):
    """A rank whose main thread would wait for ever, as in NCCL, when the other one has ended."""
    from megagpt import dist

    def fn():
        dist.watch(None, 600.0, 2)
        print("started", flush=True)
        while os.environ["RANK"] == "1" and not os.path.exists(code):
            time.sleep(0.05)
        time.sleep(0 if os.environ["RANK"] == "1" else 1000)
        return 9

    return dist.run_main(fn, on_orphan=lambda: None)


def test_a_rank_left_alone_does_not_wait_for_ever(tmp_path):
    with Job(waiting, str(tmp_path / "go")) as job:
        job.wait_for("started", rank=0)
        job.wait_for("started", rank=1)
        time.sleep(1.2)  # they have seen each other
        (tmp_path / "go").touch()
        assert job.wait(15) == [4, 9]
        assert "stops: another rank has ended" in job.output(0)
