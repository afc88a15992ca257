"""What a step sends over the network: every collective of DeepSpeed's with its bytes, exact.

Bytes of a collective are those of the whole tensor: what is summed (all-reduce), what every rank holds afterwards
(all-gather), what every rank brings (reduce-scatter). A ring sends 2 (N-1)/N of them from each rank for an all-reduce
and (N-1)/N for the others. Flags and norms of a few bytes are counted as calls alone.

Under stages 1 and 2 DeepSpeed 0.19 sums gradients with all-reduces (``use_multi_rank_bucket_allreduce``), which is
twice a reduce-scatter; stage 2 does so in every micro-step, stage 1 in the last.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megagpt.model.config import GPTConfig
from megagpt.tools.plan_gather import Gathers, gathers, padded
from megagpt.tools.plan_model import Parameter, groups, parameters
from megagpt.tools.plan_states import ELEMENT, flat_numel

ENGINE_BUCKET = 500_000_000  # elements that the engine sums at once without ZeRO (MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class ZeroSizes:
    """The sizes of a ``zero_optimization`` section, in elements."""

    reduce_bucket: int = 500_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000
    reuse: int = 10**9
    live: int = 10**9

    @classmethod
    def of(cls, zero: dict) -> "ZeroSizes":
        """Those of a section without "auto"."""
        keys = {
            "reduce_bucket": "reduce_bucket_size",
            "prefetch": "stage3_prefetch_bucket_size",
            "persistence": "stage3_param_persistence_threshold",
            "reuse": "stage3_max_reuse_distance",
            "live": "stage3_max_live_parameters",
        }
        return cls(**{name: int(zero[key]) for name, key in keys.items() if key in zero})


class Collective(NamedTuple):
    """Some of a step's collectives of one kind."""

    kind: str  # all_reduce, all_gather or reduce_scatter
    phase: str  # micro_step, boundary (the last micro-step, behind its backward pass) or step (the update)
    calls: int
    nbytes: int  # of all calls

    def sent(self, world_size: int) -> float:
        """Bytes that a rank sends in a ring."""
        return self.nbytes * (2 if self.kind == "all_reduce" else 1) * (world_size - 1) / world_size


def collectives(
    config: GPTConfig, stage: int, world_size: int, precision: str, accumulation: int, sizes: ZeroSizes
) -> list[Collective]:
    """Those of one optimiser step. A single rank has none."""
    if world_size == 1:
        return []
    e = ELEMENT[precision]
    numels = [p.numel for p in parameters(config)]
    P = sum(numels)
    if stage == 0:
        return [Collective("all_reduce", "boundary", -(-P // ENGINE_BUCKET), P * e)]
    if stage < 3:
        flat = [flat_numel(group, world_size) for group in groups(config)]
        times = accumulation if stage == 2 else 1
        calls = buckets(parameters(config), sizes.reduce_bucket)
        return [
            Collective("all_reduce", "micro_step" if stage == 2 else "boundary", calls * times, P * e * times),
            Collective("all_gather", "step", len(flat), sum(flat) * e),
        ]
    gathered = gathered_parameters(config, sizes)
    calls = buckets(parameters(config), sizes.reduce_bucket)
    within = accumulation * padded(gathered.micro_step, world_size)
    return [
        Collective("all_gather", "micro_step", accumulation * len(gathered.micro_step), within * e),
        Collective("reduce_scatter", "micro_step", calls * accumulation, padded(numels, world_size) * e * accumulation),
        Collective("all_gather", "step", 1, padded(gathered.each_step, world_size) * e),
    ]


@functools.lru_cache(maxsize=16)
def gathered_parameters(config: GPTConfig, sizes: ZeroSizes) -> Gathers:
    """What ZeRO-3 gathers under these sizes."""
    return gathers(config, prefetch=sizes.prefetch, persistence=sizes.persistence, reuse=sizes.reuse, live=sizes.live)


@functools.lru_cache(maxsize=64)
def buckets(params: Sequence[Parameter], bucket: int) -> int:
    """How many buckets of gradients a backward pass fills, from the last parameter to the first."""
    count, filled = 0, 0
    for p in reversed(params):
        if filled and filled + p.numel > bucket:
            count, filled = count + 1, 0
        filled += p.numel
    return count + bool(filled)
