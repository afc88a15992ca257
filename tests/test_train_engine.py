"""What the engine is told about this machine, and what it does when another rank falls silent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import tiny_corpus
from distributed import free_port, rank_env

from megagpt.dist import World
from megagpt.errors import ConfigError
from megagpt.train.engine import gpu_index

REPO = Path(__file__).parent.parent


def rank_of_eight(local_rank: int, launcher: str = "torch") -> World:
    return World(local_rank, 8, local_rank, 8, 0, "127.0.0.1", 29500, launcher)


@pytest.mark.parametrize(
    ("visible", "launcher", "env", "index"),
    [
        (8, "torch", {}, 5),
        (8, "slurm", {}, 5),
        (1, "slurm", {}, 0),
        (1, "torch", {"CUDA_VISIBLE_DEVICES": "5"}, 0),
    ],
    ids=["one a rank", "one a task", "each task sees its own", "each rank sees its own"],
)
def test_a_rank_takes_its_own_gpu(visible, launcher, env, index):
    assert gpu_index(rank_of_eight(5, launcher), visible, env) == index


@pytest.mark.parametrize(
    ("visible", "launcher", "env"),
    [(4, "torch", {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}), (4, "slurm", {}), (1, "torch", {})],
    ids=str,
)
def test_more_ranks_than_gpus_is_the_same_error_on_every_rank(visible, launcher, env):
    told = set()
    for local_rank in range(8):
        with pytest.raises(ConfigError) as caught:
            gpu_index(rank_of_eight(local_rank, launcher), visible, env)
        told.add(str(caught.value))
    (text,) = told
    assert text.startswith("8 ranks are to run on ")
    assert f"--num_gpus {visible}," in text


@pytest.mark.parametrize("stage", [1, 3])
def test_a_silent_peer_ends_the_wait_after_the_time_the_flag_gives(tmp_path, stage):
    """ZeRO's groups had torch's own timeout of half an hour: a frozen node kept all others waiting for it."""
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}))
    words = ["--ds_config", config, "--model", "tiny", "--n_layer", 1, "--d_model", 32, "--n_head", 2, "--seq_len", 16]
    words += ["--data", tiny_corpus(), "--run_dir", tmp_path / "run", "--max_steps", 10**6, "--log_interval", 1]
    command = [sys.executable, REPO / "train.py", *map(str, words), "--distributed_timeout_minutes", "0.2"]
    port, quiet = free_port(), {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **rank_env(rank, 2, port, str(tmp_path))}, **quiet)
        for rank in (0, 1)
    ]
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGSTOP)
        assert ranks[0].wait(timeout=60) != 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
