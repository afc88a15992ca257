"""``megagpt finetune warm``: compile what a fine-tuning run needs, once on each node before its ranks start.

One block of the model goes forward and backward over the first micro-batch of every kind of phase, and answers once as
in an evaluation: that launches every kernel of the run, but for lengths of text that come later.
"""

import dataclasses
import os
import time

import torch

from megagpt import dist
from megagpt.config import deepspeed
from megagpt.dist.world import host_name
from megagpt.finetune.fields import parse
from megagpt.finetune.model import TASK, Classifier
from megagpt.finetune.phases import open_batches
from megagpt.finetune.plan import FinetunePlan, make_plan
from megagpt.finetune.several import runs_of
from megagpt.train import engine, kernels
from megagpt.train.batches import BatchPlan


def warm_main(argv: list[str]) -> None:
    """Run ``megagpt finetune warm`` with the flags of ``finetune.py``. MEGAGPT_WARM_RANKS says how many ranks."""
    begun = time.monotonic()
    settings = runs_of(parse(argv))[0]
    # The batch is split over the ranks to come; this process is none of them.
    ranks = int(os.environ.get("MEGAGPT_WARM_RANKS", "1"))
    world = dist.World(0, ranks, 0, 1, 0, "127.0.0.1", 0, launcher="single")
    what = warm(make_plan(settings, deepspeed.load(settings.ds_config), world))
    print(f"{host_name()}: {what} ready after {time.monotonic() - begun:.0f} s", flush=True)


def warm(plan: FinetunePlan) -> str:
    """Forward and backward through one block in every kind of phase, and DeepSpeed's Adam built; what that was."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ops, choice = kernels.settle(plan, device, resumed=True)
    with device:
        model = Classifier(dataclasses.replace(plan.model, n_layer=1), plan.spec, ops)
    model.to(engine.DTYPES[plan.config.precision])
    cut = BatchPlan(plan.config.micro_batch, plan.config.accumulation, plan.config.world_size, 0)
    kinds = {(phase.phase.objective, bool(phase.phase.lm_coef)): phase for phase in plan.phases}
    for phase in kinds.values():
        model.objective, model.lm_coef = phase.phase.objective, phase.phase.lm_coef
        batch = open_batches(plan, phase, cut, phase.first, device).next()
        model.train()
        model(**batch).backward()
        if phase.phase.objective == TASK:
            model.eval()
            with torch.no_grad():
                model.logits(batch)
    adam = engine.adam_class(device, plan.config.offload_optimizer is not None)
    built = adam if isinstance(adam, str) else adam.__name__
    return f"kernels {ops.name}, attention {choice.attention}, Adam: {built};"
