"""Batch arithmetic: global batch = micro-batch x accumulation x ranks.

Worked example, 16 ranks: a global batch of 512 and a micro-batch of 8 leave 512 / (8 x 16) = 4 accumulation steps; a
global batch of 500 cannot be had, and 8 x 4 x 16 = 512 is the nearest that can.
"""

import math
from itertools import chain
from typing import NamedTuple

MOST = 2**31 - 1  # sequences; more is a slip of the keyboard
_LARGEST_AUTO_MICRO_BATCH = 16  # what a rank computes at once when nobody says


class Batch(NamedTuple):
    """Sequences a rank computes at once, such micro-batches in an update, and sequences in an update over all ranks."""

    micro: int
    accumulation: int
    total: int


def solve(micro: int | None, accumulation: int | None, total: int | None, world_size: int) -> Batch | None:
    """The batch with the given numbers, the missing ones derived; None when no whole numbers fit.

    With a micro-batch alone there is one accumulation step; with a global batch alone the micro-batch is the largest
    of at most 16 sequences that divides a rank's share. At least one number other than the accumulation is given.
    """
    if total is None:
        accumulation = accumulation or 1
        return Batch(micro, accumulation, micro * accumulation * world_size)
    share, rest = divmod(total, world_size)
    if rest:
        return None
    if micro is None and accumulation is None:
        micro = max(d for d in _divisors(share) if d <= _LARGEST_AUTO_MICRO_BATCH)
    if micro is None:
        micro = share // accumulation
    if accumulation is None:
        accumulation = share // micro
    batch = Batch(micro, accumulation, total)
    return batch if micro * accumulation == share and micro else None


def explain(micro: int | None, accumulation: int | None, total: int, world_size: int) -> str:
    """Why no batch has the given numbers, and which do."""
    factors = [f"{micro} per rank" if micro else "", f"{accumulation} steps" if accumulation else ""]
    product = " x ".join([*filter(None, factors), f"{world_size} rank{'s' * (world_size != 1)}"])
    if micro and accumulation:
        found = f"is not {product} = {micro * accumulation * world_size}"
    else:
        found = f"is no multiple of {product}"
    nearest = ", ".join(
        f"{b.micro} x {b.accumulation} x {world_size} = {b.total}"
        for b in nearest_valid(micro, accumulation, total, world_size)
    )
    return (
        f"train_batch_size {total} {found}; the nearest settings that fit (micro-batch x accumulation x ranks) are "
        f"{nearest}"
    )


def nearest_valid(
    micro: int | None, accumulation: int | None, total: int, world_size: int, count: int = 3
) -> list[Batch]:
    """The ``count`` valid batches nearest to an impossible one.

    Near means: few of the given numbers change, and those by small factors.
    """

    def distance(batch: Batch) -> tuple[int, float, Batch]:
        pairs = [(new, old) for new, old in zip(batch, (micro, accumulation, total), strict=True) if old is not None]
        changed = sum(new != old for new, old in pairs)
        return changed, sum(abs(math.log(new / old)) for new, old in pairs), batch

    candidates = {
        Batch(m, a, m * a * world_size)
        for m, a in chain(
            _keeping_total(total, world_size),
            _keeping_factor(micro, accumulation, total, world_size),
            ((m, a) for a, m in _keeping_factor(accumulation, micro, total, world_size)),
        )
    }
    if micro is None and accumulation is None:
        candidates |= {solve(None, None, n * world_size, world_size) for n in _around(total / world_size)}
    return sorted(candidates, key=distance)[:count]


def _keeping_total(total: int, world_size: int):
    if total % world_size == 0:
        share = total // world_size
        yield from ((d, share // d) for d in _divisors(share))


def _keeping_factor(kept: int | None, other: int | None, total: int, world_size: int):
    """(kept, other) pairs with ``other`` near what ``total`` asks for and near its given value."""
    if kept is not None:
        for n in {*_around(total / (kept * world_size)), *(_around(other) if other else ())}:
            yield kept, n


def _around(x: float, reach: int = 3) -> range:
    return range(max(1, math.floor(x) - reach), math.ceil(x) + reach + 1)


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in small]
