"""What the engine is told about this machine, and what it does when another rank falls silent."""

import os
import signal
import socket

import fork_server
import pytest
import torch
from checkpoint_common import arguments
from distributed import run_ranks

from megagpt.dist import World
from megagpt.dist.devices import claim, gpu_index, refuse_idle
from megagpt.errors import ConfigError
from megagpt.train.engine import agreed, device_of, make_deterministic, start_distributed, stop_distributed


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


def test_two_ranks_that_see_one_and_the_same_gpu_are_told():
    """Both call it 0, and NCCL would say so in its own words after all have met."""
    env = {"SLURM_JOB_ID": str(os.getpid())}
    claim("f00", rank_of_eight(0, "slurm"), env)
    claim("ba5", rank_of_eight(1, "slurm"), env)
    claim("f00", rank_of_eight(0, "slurm"), {"SLURM_JOB_ID": f"{os.getpid()}1"})  # as another job may
    with pytest.raises(ConfigError, match=r"another one has rank 2's \(GPU f00\); start one rank a GPU"):
        claim("f00", rank_of_eight(2, "slurm"), env)


def test_a_long_name_of_the_first_host_is_no_second_rank_on_a_gpu():
    """With it the claim's own name exceeded what a socket can be called, and every rank was told to be the second."""
    far = World(0, 2, 0, 2, 0, f"{'ip-10-0-12-34.' * 6}compute.internal", 29500, "slurm")
    gpu, env = "6f3a1c52-9a8e-4d07-b2ce-7e0cbb1f0d11", {"SLURM_JOB_ID": str(os.getpid())}
    claim(gpu, far, env)
    with pytest.raises(ConfigError, match="another one has rank 0's"):
        claim(gpu, far, env)


def test_the_one_process_of_a_job_does_not_leave_other_gpus_idle_in_silence(monkeypatch):
    alone = World(0, 1, 0, 1, 0, "127.0.0.1", 29500, "single")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ConfigError, match=r"one process of job 7 .* sees 8 GPUs; .*--ntasks-per-node=8, .*_DEVICES=0"):
        device_of(alone)
    refuse_idle(alone, 1, {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0"})
    refuse_idle(alone, 8, {})
    refuse_idle(World(0, 1, 0, 1, 0, "127.0.0.1", 29500, "torch"), 8, {"SLURM_JOB_ID": "7"})  # a launcher was told so


def _choice_of_a_host_with_a_compiler_and_one_without(reason):
    start_distributed(timeout_minutes=1)
    torch.cuda.is_available = lambda: True  # of the choice alone: the ranks talk over gloo
    mine = torch.optim.Adam if os.environ["RANK"] == "0" else reason
    chosen = [agreed(torch.optim.Adam).__name__, agreed(mine)]
    torch.cuda.is_available = lambda: False
    stop_distributed()
    return chosen


def test_all_ranks_take_the_optimiser_that_each_of_them_has():
    """One host without nvcc would step its part with torch's AdamW and the others theirs with DeepSpeed's."""
    results = run_ranks(_choice_of_a_host_with_a_compiler_and_one_without, 2, "fused_adam does not build: no nvcc")
    told = f"{socket.gethostname()}: fused_adam does not build: no nvcc"
    assert [chosen for chosen, _ in results] == [["Adam", told]] * 2


@pytest.mark.parametrize("stage", [1, 3])
def test_a_silent_peer_ends_the_wait_after_the_time_the_flag_gives(tmp_path, stage):
    """ZeRO's groups had torch's own timeout of half an hour: a frozen node kept all others waiting for it."""
    flags = {"max_steps": 10**6, "save_interval": 0, "distributed_timeout_minutes": 0.1, "hang_timeout": 1000}
    with fork_server.train(arguments(tmp_path / "run", stage=stage, **flags)) as job:
        job.wait_for("iteration        2/")
        job.send(signal.SIGSTOP, 1)
        job.processes[0].join(60)
        assert job.processes[0].exitcode == 5
        assert "another rank has not answered in time" in job.output(0)


def test_deterministic_makes_torch_refuse_what_has_no_such_form(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
