"""``megagpt warm``: compile what a run needs, once on each node before its ranks start.

Otherwise every rank of a node compiles the same kernels at the same time, within the first step. One block of the
model, with everything else as in the run, launches every kernel that the whole model launches.
"""

import dataclasses
import os
import time

from megagpt import dist
from megagpt.dist.world import host_name
from megagpt.train.plan import Plan


def warm_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt warm`` with the flags of ``train.py``; the exit code. MEGAGPT_WARM_RANKS says how many ranks."""
    from megagpt.config import deepspeed
    from megagpt.config.fields import parse
    from megagpt.train.plan import make_plan

    begun = time.monotonic()
    settings = parse(argv)
    # The batch is split over the ranks to come; this process is none of them.
    ranks = int(os.environ.get("MEGAGPT_WARM_RANKS", "1"))
    world = dist.World(0, ranks, 0, 1, 0, "127.0.0.1", 0, launcher="single")
    plan = make_plan(settings, deepspeed.load(settings.ds_config), world)
    what = warm(plan)
    print(f"{host_name()}: {what} ready after {time.monotonic() - begun:.0f} s", flush=True)
    return 0


def warm(plan: Plan) -> str:
    """Forward and backward through one block at the run's shapes, and DeepSpeed's Adam built; what that was."""
    import torch

    from megagpt.model.gpt import GPT
    from megagpt.train import engine, kernels

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ops, choice = kernels.settle(plan, device, resumed=True)
    config = dataclasses.replace(plan.model, n_layer=1)
    dtype = engine.DTYPES[plan.config.precision]
    with device:
        model = GPT(config, ops).to(dtype)
        ids = torch.zeros(plan.config.micro_batch, config.seq_len, dtype=torch.long)
    model(ids, ids).backward()
    adam = engine.adam_class(device, plan.config.offload_optimizer is not None)
    built = adam if isinstance(adam, str) else adam.__name__
    return f"kernels {ops.name}, attention {choice.attention}, Adam: {built};"
