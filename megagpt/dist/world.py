"""Which rank this process is, of how many, and where they meet.

torchrun's and the deepspeed launcher's variables come first, then those of the Slurm step that srun made, then those of
the Slurm job, and without any of them the process is alone.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megagpt.dist.hostlist import expand_hostlist, expand_tasks
from megagpt.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all of the job."""

    rank: int
    world_size: int
    local_rank: int  # among those on this host
    local_world_size: int
    node_rank: int
    master_addr: str  # where rank 0 listens
    master_port: int
    launcher: str  # torch, slurm or single: whose variables said so

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or not 0 <= self.local_rank < self.local_world_size:
            raise ConfigError(
                f"rank {self.rank} of {self.world_size} (on this host {self.local_rank} of {self.local_world_size}) "
                "cannot be; start with deepspeed, torchrun or srun, or unset RANK, LOCAL_RANK and WORLD_SIZE"
            )


def resolve_world(env: Mapping[str, str]) -> World:
    """The world that the environment variables describe; raises ConfigError when they are incomplete or absurd."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_torch(env)
    if "SLURM_PROCID" in env and _slurm_tasks(env) > 1:
        return _from_slurm(env)
    return World(0, 1, 0, 1, 0, "127.0.0.1", _port(env) or _free_port(), launcher="single")


def _from_torch(env: Mapping[str, str]) -> World:
    tasks = _first_number(env, "SLURM_STEP_NUM_TASKS") or 1
    if tasks > 1 and env.get("CROSS_SIZE") == "1":  # the deepspeed launcher's, on one host
        raise ConfigError(
            f"each of the {tasks} tasks that srun started runs a deepspeed launcher of its own; "
            "start the script itself: srun --kill-on-bad-exit=1 python train.py ..."
        )
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    alone = world_size == 1
    local_rank = _first_number(env, "LOCAL_RANK", "SLURM_LOCALID")
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if alone else _first_host(env))
    port = _port(env) or (_free_port() if alone else _job_port(env))
    found = {"LOCAL_RANK": 0 if alone else local_rank, "MASTER_ADDR": address, "MASTER_PORT": port}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={world_size} are set, {' and '.join(missing)} not; "
            "start with deepspeed, torchrun or srun, which set them all"
        )
    # The deepspeed launcher says LOCAL_SIZE and CROSS_RANK where torchrun says LOCAL_WORLD_SIZE and GROUP_RANK.
    local_world_size = _first_number(env, "LOCAL_WORLD_SIZE", "LOCAL_SIZE") or world_size
    node_rank = _first_number(env, "GROUP_RANK", "CROSS_RANK", "NODE_RANK")
    if node_rank is None:
        node_rank = rank // local_world_size
    return World(rank, world_size, local_rank or 0, local_world_size, node_rank, address, port, launcher="torch")


def _from_slurm(env: Mapping[str, str]) -> World:
    rank, world_size = _number(env, "SLURM_PROCID"), _slurm_tasks(env)
    if rank == 0 and not any(name in env for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS")):
        raise ConfigError(
            f"this is the one process of a batch script whose job has {world_size} tasks; "
            "start them all with srun: srun --kill-on-bad-exit=1 python train.py ..."
        )
    node_rank = _first_number(env, "SLURM_NODEID") or 0
    tasks = expand_tasks(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(world_size))
    if node_rank >= len(tasks):
        raise ConfigError(f"SLURM_NODEID is {node_rank} and Slurm lists tasks on {len(tasks)} nodes; start with srun")
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if len(tasks) == 1 else _first_host(env))
    port = _port(env) or _job_port(env)
    if address is None or port is None:
        raise ConfigError("Slurm says neither SLURM_STEP_NODELIST nor SLURM_JOB_ID; set MASTER_ADDR and MASTER_PORT")
    local_rank = _number(env, "SLURM_LOCALID")
    return World(rank, world_size, local_rank, tasks[node_rank], node_rank, address, port, launcher="slurm")


def _slurm_tasks(env: Mapping[str, str]) -> int:
    return _first_number(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS") or 1


def _first_host(env: Mapping[str, str]) -> str | None:
    """The host of rank 0: the step's first, else the job's."""
    text = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    return expand_hostlist(text)[0] if text else None


def _job_port(env: Mapping[str, str]) -> int | None:
    """A port that two jobs, or two steps of one, on a host don't share, below Linux's ephemeral ports (from 32768 on).

    Numbers of jobs that run at the same time are close to each other, hence the odd distance between steps.
    """
    job = _first_number(env, "SLURM_JOB_ID", "SLURM_JOBID")
    step = _first_number(env, "SLURM_STEP_ID", "SLURM_STEPID") or 0
    return None if job is None else 20000 + (job + 3001 * step) % 10000


def _port(env: Mapping[str, str]) -> int | None:
    port = _first_number(env, "MASTER_PORT")
    if port is not None and not 0 < port < 65536:
        raise ConfigError(f"MASTER_PORT={port} is no port; give one from 1 to 65535")
    return port


def _first_number(env: Mapping[str, str], *names: str) -> int | None:
    return next((_number(env, name) for name in names if env.get(name)), None)


def _number(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "").strip()
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        found = f"{name}={text[:40]!r}" if name in env else f"{name} is missing and"
        raise ConfigError(f"{found} must be a whole number; start with deepspeed, torchrun or srun, which set it")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def export(world: World, env: MutableMapping[str, str] = os.environ) -> None:
    """Write ``world`` where torch and DeepSpeed look for it. Raises ConfigError when rank 0's port is taken."""
    _check_port(world, env)
    env.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.world_size),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.local_world_size),
        LOCAL_SIZE=str(world.local_world_size),
        MASTER_ADDR=world.master_addr,
        MASTER_PORT=str(world.master_port),
    )


def _check_port(world: World, env: Mapping[str, str]) -> None:
    """Rank 0 is about to listen there, and would join another job, or hang, where that one listens already.

    Under torchrun the launcher itself does.
    """
    if world.rank or world.world_size == 1 or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", world.master_port))
        except OSError as error:
            raise ConfigError(
                f"rank 0 cannot listen on port {world.master_port} of {socket.gethostname()} ({error.strerror}); "
                "give another one: --master_port with deepspeed or torchrun, MASTER_PORT with srun"
            ) from None


def is_main(env: Mapping[str, str] = os.environ) -> bool:
    """True on rank 0, and where no launcher's variable says a rank."""
    return (env.get("RANK") or env.get("SLURM_PROCID") or "0") == "0"


def host_name(env: Mapping[str, str] = os.environ) -> str:
    """The name under which Slurm knows this host, else its own."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()
