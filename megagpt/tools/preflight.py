"""``megagpt preflight``: are all hosts of this job sound? To be started on every rank, as with srun."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from megagpt import dist
from megagpt.config.flags import parse_flags
from megagpt.dist import preflight
from megagpt.dist.devices import own_gpu
from megagpt.dist.rendezvous import meet


@dataclass(frozen=True)
class PreflightSettings:
    """Check and measure the hosts of a job: srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 megagpt preflight"""

    run_dir: str = "runs"  # a folder on the disk that the run is to write to
    slow: Literal["warn", "stop"] = "stop"  # whether slow hosts, too, make the command fail; broken ones always do
    timeout_minutes: float = 2.0  # how long ranks wait for each other


def preflight_main(argv: Sequence[str] | None = None) -> int:
    """Run ``megagpt preflight``; exit code 0, or 2 where a host is unfit."""
    settings = parse_flags(PreflightSettings, argv, prog="megagpt preflight")
    world = dist.resolve_world(os.environ)

    import torch
    from torch import distributed

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", own_gpu(world))
    dist.export(world)
    store = meet(world, settings.run_dir, 60 * settings.timeout_minutes)
    met = {} if store is None else {"store": store, "rank": world.rank, "world_size": world.world_size}
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=settings.timeout_minutes), **met
    )
    preflight.check(world, Path(settings.run_dir), device, slow_too=settings.slow == "stop")
    distributed.destroy_process_group()
    return 0
