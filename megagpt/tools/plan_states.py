"""Bytes of a model's state on one rank, as DeepSpeed 0.19 lays it out: exact, padding included.

P parameters, N ranks, e bytes of a parameter in the training's precision (2, or 4 in fp32). The optimiser has two
groups, one that decays and one that does not, and each is cut on its own:

- stage 0: everything whole. In 16 bit a float32 copy beside the parameters; in fp32 none.
- stages 1 and 2: each group flat, filled up to a multiple of 2 N elements; a rank holds the whole flat group in
  e bytes and the N-th part of it in float32, with both moments.
- stage 3: each parameter for itself, filled up to a multiple of N; a rank holds the N-th part of each in e bytes and
  in float32, with both moments, and its part of the gradients for the whole step.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

from megagpt.model.config import GPTConfig
from megagpt.tools.plan_model import Parameter, groups

ALIGNMENT = 2  # elements: all-gather's buffers begin at multiples of 4 bytes (nccl_start_alignment_factor)
FP32 = 4
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class States:
    """Bytes on one rank."""

    parameters: int
    gradients: int  # at the end of the backward pass
    master: int  # float32 copy of the parameters
    moments: int  # Adam's two

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def model_states(
    config: GPTConfig, stage: int, world_size: int, precision: str, *, rank: int = 0, accumulation: int = 1
) -> States:
    """The state of ``config`` under ZeRO ``stage`` on ``rank`` of ``world_size``."""
    e = ELEMENT[precision]
    cut = groups(config)
    if stage == 0:
        P = sum(p.numel for group in cut for p in group)
        return States(P * e, P * e, 0 if precision == "fp32" else P * FP32, 2 * P * FP32)
    if stage < 3:
        flat = [flat_numel(group, world_size) for group in cut]
        part = sum(flat) // world_size
        gradients = sum(sum(p.numel for p in group) for group in cut) * e
        if stage == 2:
            gradients = sum(touched(group, world_size, rank) for group in cut) * e
            gradients *= 1 if accumulation == 1 else 2  # the sum so far, and this micro-batch's beside it
        return States(sum(flat) * e, gradients, part * FP32, 2 * part * FP32)
    part = sum(-(-p.numel // world_size) for group in cut for p in group)
    return States(part * e, part * e, part * FP32, 2 * part * FP32)


@functools.lru_cache(maxsize=64)
def flat_numel(group: Sequence[Parameter], world_size: int) -> int:
    """Elements of a flat group under stages 1 and 2."""
    unit = ALIGNMENT * world_size
    return -(-sum(p.numel for p in group) // unit) * unit


def touched(group: Sequence[Parameter], world_size: int, rank: int) -> int:
    """Elements of all parameters of which at least one lies in the part of ``rank``: their gradients stay whole."""
    part = flat_numel(group, world_size) // world_size
    ends = list(accumulate(p.numel for p in group))
    low, high = rank * part, (rank + 1) * part
    return sum(p.numel for p, end in zip(group, ends, strict=True) if end > low and end - p.numel < high)


@functools.lru_cache(maxsize=64)
def most_touched(group: Sequence[Parameter], world_size: int) -> int:
    """:func:`touched` of the rank that has most."""
    part = flat_numel(group, world_size) // world_size
    sums = [0] * world_size
    end = 0
    for p in group:
        first, end = end, end + p.numel
        for rank in range(first // part, min(world_size, -(-end // part))):
            sums[rank] += p.numel
    return max(sums)
