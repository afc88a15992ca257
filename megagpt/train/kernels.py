"""The operations of a run: chosen once, the same on every rank, told in run.json and kept when the run goes on."""

from dataclasses import asdict

import torch

from megagpt import dist
from megagpt.ops import Ops, load_ops
from megagpt.ops.choose import Choice, Timer, choose_attention, with_attention
from megagpt.train import report
from megagpt.train.engine import DTYPES
from megagpt.train.plan import Plan


def load(plan: Plan, device: torch.device) -> Ops:
    """The backend that ``--kernels`` names or, with auto, the best that can serve. Raises ConfigError."""
    dtype = DTYPES[plan.config.precision]
    return load_ops(plan.settings.kernels, head_width=plan.model.head_width, dtype=dtype, device=device)


def settle(plan: Plan, device: torch.device, *, resumed: bool) -> tuple[Ops, Choice]:
    """The operations to train with; with ``--kernels auto`` on a GPU their attention is the fastest there is."""
    ops = load(plan, device)
    if plan.settings.kernels != "auto" or device.type != "cuda":
        return ops, Choice(ops.name, {}, {})
    choice = agree(ops, plan, device, kept=earlier_choice(plan) if resumed else None)
    torch.cuda.empty_cache()  # of the tensors that were timed
    return with_attention(ops, choice.attention), choice


def agree(ops: Ops, plan: Plan, device: torch.device, *, kept: Choice | None, time: Timer | None = None) -> Choice:
    """The choice of rank 0, on every rank."""

    def choose() -> dict | None:
        if not dist.is_main():
            return None
        model = plan.model
        shape = (plan.config.micro_batch, model.seq_len, model.n_head, model.head_width)
        dtype = DTYPES[plan.config.precision]
        p = model.attn_dropout
        return asdict(choose_attention(ops, shape, dtype=dtype, device=device, dropout_p=p, kept=kept, time=time))

    return Choice(**dist.gather_json(dist.everywhere(choose))[0])


def earlier_choice(plan: Plan) -> Choice | None:
    """What this run took when it started, if its run.json can be read."""
    found = report.read_run(plan.run_dir).get("kernels")
    try:
        return Choice(found["attention"], dict(found["milliseconds"]), dict(found["dropped"]))
    except (TypeError, KeyError, ValueError):
        return None


def describe(ops: Ops, choice: Choice) -> dict:
    """For run.json: the backend, and the choice of attention with what it rests on."""
    return {"backend": ops.name, **asdict(choice)}
