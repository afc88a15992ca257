"""Ranks, address and port from the variables that torch's launchers, DeepSpeed's and Slurm set."""

import dataclasses
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.dist import World, export, is_main, resolve_world
from megagpt.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {  # task 5 of a step of 7 tasks on 3 of the job's 4 nodes, as Slurm 22.05 sets them
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "login1,n[07-09]",
    "SLURM_NTASKS": "16",
    "SLURM_TASKS_PER_NODE": "4(x4)",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[07-09]",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_without_a_launcher_the_process_is_alone():
    world = resolve_world({})
    assert (world.rank, world.world_size, world.local_rank, world.launcher) == (0, 1, 0, "single")
    assert world.master_addr == "127.0.0.1"
    assert 1024 <= world.master_port < 65536


def test_torchrun():
    assert resolve_world(TORCHRUN) == World(5, 8, 1, 4, 1, "n1", 29500, "torch")


def test_the_deepspeed_launcher():
    assert resolve_world(DEEPSPEED) == World(1, 2, 1, 2, 0, "127.0.0.1", 29500, "torch")


def test_a_slurm_step_comes_before_its_job():
    assert resolve_world(SRUN) == World(5, 7, 0, 2, 2, "n07", 20000 + 4567, "slurm")


def test_the_job_is_used_where_the_step_says_nothing():
    job = {name: value for name, value in SRUN.items() if "_STEP_" not in name}
    job.update(SLURM_NODEID="1", SLURM_LOCALID="1")
    assert resolve_world(job) == World(5, 16, 1, 4, 1, "login1", 24567, "slurm")


def test_torch_variables_win_over_slurm():
    assert resolve_world({**SRUN, **TORCHRUN}) == resolve_world(TORCHRUN)


def test_an_own_address_and_port_win_over_slurms():
    world = resolve_world({**SRUN, "MASTER_ADDR": "n08-ib", "MASTER_PORT": "23456"})
    assert (world.master_addr, world.master_port) == ("n08-ib", 23456)


def test_hand_set_ranks_under_slurm_meet_where_slurm_says():
    env = {**SRUN, "RANK": "5", "WORLD_SIZE": "7"}
    world = resolve_world(env)
    assert (world.rank, world.local_rank, world.master_addr, world.master_port) == (5, 0, "n07", 24567)


def test_two_jobs_that_share_a_node_have_different_ports():
    ports = {resolve_world({**SRUN, "SLURM_JOB_ID": str(job)}).master_port for job in range(5000, 6000)}
    assert len(ports) == 1000
    assert max(ports) < 32768  # Linux hands out the ports above to anyone


def test_two_steps_of_a_job_that_share_a_node_have_different_ports():
    ports = {resolve_world({**SRUN, "SLURM_STEP_ID": str(step)}).master_port for step in range(1000)}
    assert len(ports) == 1000
    neighbours = {
        resolve_world({**SRUN, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).master_port
        for job in range(1234567, 1234667)
        for step in range(3)
    }
    assert len(neighbours) == 300


def test_one_task_of_slurm_is_alone():
    assert resolve_world({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).launcher == "single"


def test_a_batch_script_without_srun_is_told_so():
    batch = {name: value for name, value in SRUN.items() if "_STEP_" not in name}
    with pytest.raises(ConfigError, match="batch script whose job has 16 tasks; start them all with srun"):
        resolve_world({**batch, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})


def test_a_launcher_in_every_task_is_told_so():
    with pytest.raises(ConfigError, match="each of the 7 tasks that srun started runs a deepspeed launcher of its own"):
        resolve_world({**SRUN, **DEEPSPEED})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"RANK": ""}, "RANK=''"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"WORLD_SIZE": "0"}, "rank 5 of 0"),
        ({"LOCAL_RANK": "4"}, "4 of 4"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not"),
        ({"MASTER_PORT": ""}, "MASTER_PORT not"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK not"),
        ({"WORLD_SIZE": "9" * 400}, "WORLD_SIZE='999"),
    ],
    ids=str,
)
def test_absurd_variables_are_named(change, part):
    with pytest.raises(ConfigError) as caught:
        resolve_world({**TORCHRUN, **change})
    assert part in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_missing_variable_is_named():
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        with pytest.raises(ConfigError, match=name):
            resolve_world({key: value for key, value in TORCHRUN.items() if key != name})


@given(st.dictionaries(st.sampled_from(sorted({*TORCHRUN, *DEEPSPEED, *SRUN})), st.text("0123x(,)[]-n ", max_size=6)))
def test_any_variables_give_a_world_or_a_config_error(env):
    try:
        world = resolve_world(env)
    except ConfigError:
        return
    assert 0 <= world.rank < world.world_size


def test_export_is_what_torch_and_deepspeed_read():
    env = {}
    export(resolve_world(SRUN), env)
    again = resolve_world(env)
    assert dataclasses.replace(again, launcher="slurm", node_rank=2) == resolve_world(SRUN)


def test_a_taken_port_is_told_before_anyone_waits():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        world = World(0, 2, 0, 2, 0, "127.0.0.1", port, "torch")
        with pytest.raises(ConfigError, match=f"cannot listen on port {port} of .*MASTER_PORT with srun"):
            export(world, {})
        export(world, {"TORCHELASTIC_USE_AGENT_STORE": "True"})
        export(dataclasses.replace(world, rank=1), {})
    export(world, {})


def test_rank_0_is_main_under_every_launcher():
    assert is_main({})
    assert is_main({"RANK": "0", "SLURM_PROCID": "3"})
    assert not is_main({"RANK": "1"})
    assert not is_main({"SLURM_PROCID": "3"})
