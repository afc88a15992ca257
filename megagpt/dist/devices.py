"""Which GPU is whose: one for each rank."""

import errno
import hashlib
import os
import socket
from collections.abc import Mapping

from megagpt.dist.world import World
from megagpt.errors import ConfigError

_claims: list[socket.socket] = []  # of this process, for as long as it lives


def own_gpu(world: World) -> int:
    """The index of this rank's GPU, which becomes the current one. Raises ConfigError where another rank has it."""
    import torch

    index = gpu_index(world, torch.cuda.device_count())
    torch.cuda.set_device(index)
    name = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if name is not None and world.world_size > 1:
        claim(str(name), world)
    return index


def gpu_index(world: World, visible: int, env: Mapping[str, str] = os.environ) -> int:
    """Which of the ``visible`` GPUs is this rank's: the one of its local rank, or the only one it is allowed to see.

    Raises ConfigError where the ranks of this host outnumber its GPUs.
    """
    allowed = env.get("CUDA_VISIBLE_DEVICES", "")
    if visible == 1 and (world.launcher == "slurm" or (allowed and "," not in allowed)):
        return 0  # as with srun --gpus-per-task
    if world.local_world_size > visible:
        raise ConfigError(
            f"{world.local_world_size} ranks are to run on {socket.gethostname()} and it has {visible} GPU"
            f"{'s' * (visible != 1)}; start one a GPU (deepspeed --num_gpus {visible}, torchrun --nproc_per_node "
            f"{visible}, srun --ntasks-per-node={visible}), or set LOCAL_WORLD_SIZE if some run on other hosts"
        )
    return world.local_rank


def refuse_idle(world: World, visible: int, env: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError where the one process of a job was given several GPUs.

    On a desktop that is a choice; in a job the others would stand idle for as long as it trains.
    """
    if world.launcher == "single" and visible > 1 and env.get("SLURM_JOB_ID"):
        raise ConfigError(
            f"this is the one process of job {env['SLURM_JOB_ID']} on {socket.gethostname()} and it sees {visible} "
            f"GPUs; start one a GPU (srun --ntasks-per-node={visible}, deepspeed --num_gpus {visible}), or set "
            "CUDA_VISIBLE_DEVICES=0 to train on one of them"
        )


def claim(gpu: str, world: World, env: Mapping[str, str] = os.environ) -> None:
    """Take the GPU of that name for this rank. Raises ConfigError where another rank of this run has it.

    Every rank may see a single GPU and call it 0: whether that is the same one, the variables don't tell, and NCCL says
    so only after all have met. The claim is a socket in Linux's abstract namespace, which vanishes with its process.
    """
    about = f"{os.getuid()} {world.master_addr} {world.master_port} {env.get('SLURM_JOB_ID', '')} {gpu}"
    name = hashlib.sha256(about.encode()).hexdigest()  # names of hosts may be longer than the 107 bytes of an address
    sign = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sign.bind(f"\0megagpt-gpu-{name}")
    except OSError as error:
        sign.close()
        if error.errno != errno.EADDRINUSE:  # a sandbox without such sockets: NCCL will have to say it
            return
        raise ConfigError(
            f"the {world.local_world_size} ranks on {socket.gethostname()} were given fewer GPUs than that: another one "
            f"has rank {world.rank}'s (GPU {gpu}); start one rank a GPU: as many --ntasks-per-node as --gpus-per-node, "
            "or a GPU of its own in each rank's CUDA_VISIBLE_DEVICES"
        ) from None
    _claims.append(sign)
