"""The rank that the others wait for is named."""

import os
import time

from checkpoint_common import arguments
from fork_server import Job, train_main

from megagpt.train import metrics
from megagpt.train.stragglers import RankTimes


def slowed(argv):
    """``train.py`` whose rank 1 takes thirty milliseconds more for each forward pass from step 20 on."""
    from megagpt.train import loop

    forward, calls = loop.next_token_loss, iter(range(10**6))

    def slow(engine, ids):
        if os.environ["RANK"] == "1" and next(calls) >= 20:
            time.sleep(0.03)
        return forward(engine, ids)

    loop.Loop.__init__.__kwdefaults__["forward"] = slow
    return train_main(argv)


def test_a_slow_rank_is_named_within_twenty_steps(tmp_path):
    argv = arguments(tmp_path / "run", max_steps=60, log_interval=5, save_interval=0)
    with Job(slowed, [str(word) for word in argv]) as job:
        assert job.wait() == [0, 0], job.output()
        before, _, after = job.output(0).partition(f"WARNING: rank 1 on {os.uname().nodename} is slow: ")
    steps = [line.split("iteration")[1].split("/")[0].strip() for line in before.splitlines() if "iteration" in line]
    assert after, before
    assert 25 <= int(steps[-1]) <= 40
    last = metrics.read(tmp_path / "run" / metrics.NAME)[-1]["rank_ms"]
    assert last["max"] - last["min"] > 20
    assert last["min"] <= last["median"] <= last["max"]


def test_chance_is_no_straggler_and_one_is_named_once():
    import torch

    times = RankTimes(torch.device("cpu"))
    even, late = [10.0, 11.0, 12.0, 10.0], [10.0, 11.0, 30.0, 10.0]
    seen = [times._stand_out(t) for t in (even, late, even, late, late, late, even, late, late)]
    assert seen == [[], [], [], [], [2], [], [], [], [2]]
