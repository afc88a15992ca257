"""Ranks that cannot meet say why in a sentence, soon, and no job joins another one's run."""

import os
import signal
import socket

import pytest
from fork_server import Job

from megagpt import dist
from megagpt.dist.rendezvous import check_slurm, run_id
from megagpt.dist.world import World
from megagpt.errors import ConfigError


def met(run_dir="run", seconds=4.0, hold=None):
    """Meet as training does, then add up a one of each rank; rank 0 writes the sum."""
    from megagpt.train.stopping import listening

    def fn():
        world = dist.resolve_world(os.environ)
        dist.export(world)
        from torch import distributed, ones

        from megagpt.dist.rendezvous import meet

        print("here", flush=True)
        store = meet(world, run_dir, seconds, asked=stop.asked)
        print("met", flush=True)
        while hold and not os.path.exists(hold):
            pass
        distributed.init_process_group("gloo", store=store, rank=world.rank, world_size=world.world_size)
        total = ones(1)
        distributed.all_reduce(total)
        print(f"sum {total.item():g}", flush=True)
        distributed.barrier()
        distributed.destroy_process_group()

    with listening() as stop:
        return dist.run_main(fn)


def ended(*args, ranks=2, env=None, timeout=15):
    with Job(met, *args, ranks=ranks, env=env) as job:
        return job.wait(timeout), [job.output(rank) for rank in range(ranks)]


def test_ranks_meet():
    codes, outputs = ended()
    assert codes == [0, 0]
    assert all(output.endswith("here\nmet\nsum 2\n") for output in outputs)


def test_a_second_job_on_the_same_port_leaves_and_the_first_does_not_notice(tmp_path):
    with Job(met, "first", 10.0, str(tmp_path / "go"), ranks=2) as first:
        first.wait_for("met", rank=0)
        first.wait_for("met", rank=1)
        codes, (told, other) = ended("second", env={"MASTER_PORT": str(first.port)})
        assert codes == [2, 2]
        assert "rank 0 cannot listen on port" in told
        assert "another run listens at 127.0.0.1:" in other
        (tmp_path / "go").touch()
        assert first.wait() == [0, 0]
        assert first.output().count("sum 2") == 2


def test_who_is_missing_is_named():
    codes, outputs = ended("run", 2.0, env=THREE)
    assert codes == [4, 4]
    assert "error: 2 of 3 ranks have come to 127.0.0.1:" in outputs[0]
    assert "and rank 2 is missing" in outputs[0]
    assert outputs[1] == "here\n"  # rank 0 has said it


THREE = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_while_ranks_wait_for_the_last_one_ends_them_all(number, rank):
    with Job(met, "run", 60.0, ranks=2, env=THREE) as job:
        for other in (0, 1):
            job.wait_for("here", rank=other)
        job.send(number, rank)
        assert job.wait(15) == [75, 75]
        told = f"stops: {number.name} on rank {rank}, before all ranks had met"
        assert job.output().count(told) == 1, job.output()


def test_a_signal_while_nobody_listens_at_the_meeting_point_ends_the_rank_that_waits():
    with Job(met, "run", 60.0, ranks=1, env={**THREE, "RANK": "1"}) as job:
        job.wait_for("here")
        job.send(signal.SIGTERM)
        assert job.wait(15) == [75]
        assert "stops: SIGTERM on rank 1" in job.output()


def test_a_signal_after_all_have_met_is_left_to_the_first_step(tmp_path):
    with Job(met, "run", 10.0, str(tmp_path / "go")) as job:
        for rank in (0, 1):
            job.wait_for("met", rank=rank)
        job.send(signal.SIGTERM, 1)
        (tmp_path / "go").touch()
        assert job.wait() == [0, 0], job.output()


def test_a_rank_whose_first_one_never_comes_says_so():
    codes, (told,) = ended("run", 1.0, ranks=1, env={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert codes == [4]
    assert "rank 0 has not come to 127.0.0.1:" in told


def test_two_processes_with_one_rank_are_told():
    codes, outputs = ended("run", 4.0, ranks=3, env=lambda rank: {**THREE, "RANK": str(min(rank, 1))})
    assert codes == [2, 2, 2]
    assert "two processes are rank 1: process " in "".join(outputs)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"MASTER_ADDR": "x" * 70}, "is the name of no host here"),
        ({"MASTER_ADDR": "255.255.255.255"}, "cannot reach MASTER_ADDR=255.255.255.255"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR not"),
        ({"MASTER_PORT": "seventy"}, "MASTER_PORT='seventy' must be a whole number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        ({"RANK": ""}, "RANK='' must be a whole number"),
    ],
    ids=["unresolvable", "unreachable", "no address", "no number", "no port", "no rank"],
)
def test_what_cannot_be_right_is_told_in_a_sentence(env, told):
    codes, (output,) = ended("run", 1.0, ranks=1, env={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **env})
    assert codes == [2]
    assert told in output
    assert output.removeprefix("here\n").count("\n") == 1


def test_a_port_that_another_program_has_keeps_no_rank_waiting():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        codes, outputs = ended("run", 2.0, env={"MASTER_PORT": str(other.getsockname()[1])})
    assert codes == [2, 2]
    assert "rank 0 cannot listen on port" in outputs[0]
    assert outputs[1] == "here\n"  # rank 0 has said it


SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}


def test_a_world_that_contradicts_srun_is_refused():
    two, four = (World(1, size, 1, size, 0, "h", 1, launcher="torch") for size in (2, 4))
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2 and srun started 4 tasks"):
        check_slurm(two, SRUN)
    check_slurm(four, SRUN)
    check_slurm(two, {})
    check_slurm(two, {**SRUN, "GROUP_RANK": "0"})  # torchrun in each task


def test_runs_differ_by_folder_size_and_job():
    world, larger = (World(0, size, 0, size, 0, "h", 1, launcher="torch") for size in (2, 4))
    runs = [(world, "a", {}), (world, "b", {}), (larger, "a", {}), (world, "a", {"SLURM_JOB_ID": "7"})]
    assert len({run_id(*run) for run in runs}) == 4
    assert run_id(world, "a", {}) == run_id(World(1, 2, 1, 2, 0, "h", 1, launcher="torch"), "a", {})
