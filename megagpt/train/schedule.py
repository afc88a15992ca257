"""Learning-rate schedules: pure functions from an update's index to a multiplier of the base rate.

``t`` counts applied updates from 0 (an update skipped for overflow does not advance it), ``total`` is the number of
updates of the run or phase, and the multiplier lies in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megagpt.errors import ConfigError, nearest


def warmup_linear(t: int, total: int, warmup: float) -> float:
    """GPT-1's fine-tuning schedule, as its authors' code computes it: the warm-up multiplies the decay."""
    x = t / total
    return (x / warmup if warmup and x <= warmup else 1.0) * (1.0 - x)


def warmup_constant(t: int, total: int, warmup: float) -> float:
    """Linear to 1 over the fraction ``warmup`` of the run, then 1."""
    x = t / total
    return x / warmup if warmup and x <= warmup else 1.0


def warmup_cosine(t: int, total: int, warmup: float) -> float:
    """GPT-1's pre-training schedule: linear to 1 over the warm-up, then half a cosine to 0 over the rest."""
    steps = round(warmup * total)
    if t < steps:
        return t / steps
    return 0.5 * (1.0 + math.cos(math.pi * (t - steps) / max(1, total - steps)))


def warmup_cosine_reference(t: int, total: int, warmup: float) -> float:
    """The cosine of GPT-1's released code: it runs over the whole training, so it jumps where the warm-up ends."""
    x = t / total
    return x / warmup if warmup and x <= warmup else 0.5 * (1.0 + math.cos(math.pi * x))


def stlr(t: int, total: int, cut_frac: float = 0.1, ratio: float = 32.0) -> float:
    """ULMFiT's slanted triangle, in the form that never leaves [1/ratio, 1] whatever ``total`` is.

    The published denominator cut * (1/cut_frac - 1) gives a negative tail where total * cut_frac is not whole.
    """
    cut = max(1, math.floor(total * cut_frac))
    p = t / cut if t < cut else 1.0 - (t - cut) / max(1, total - cut)
    return (1.0 + p * (ratio - 1.0)) / ratio


SCHEDULES: dict[str, Callable[..., float]] = {
    "warmup_cosine": warmup_cosine,
    "warmup_linear": warmup_linear,
    "warmup_constant": warmup_constant,
    "warmup_cosine_reference": warmup_cosine_reference,
    "stlr": stlr,
}


@dataclass(frozen=True)
class Schedule:
    """One schedule of one run: ``multiplier(t)`` scales every group's base rate.

    ``floor`` is the lowest multiplier after the warm-up (min_lr / lr): the decay runs from 1 to it instead of to 0.
    """

    name: str
    total: int  # updates
    warmup_steps: float = 0  # updates; unused by stlr
    floor: float = 0.0
    first: int = 0  # the update of the run with which this schedule begins

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ConfigError(
                f"--schedule {self.name} is unknown{nearest(self.name, SCHEDULES)}; choose among {', '.join(SCHEDULES)}"
            )
        if self.total < 1:
            raise ConfigError(f"a schedule needs at least one update, not {self.total}; raise --max_steps")
        if not 0 <= self.warmup_steps <= self.total:
            raise ConfigError(
                f"--warmup_steps {self.warmup_steps} does not fit a run of {self.total} updates; "
                f"choose 0 to {self.total} or a longer run"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigError(f"--min_lr must lie between 0 and --lr, not at {self.floor:g} times --lr")

    def multiplier(self, t: int) -> float:
        """The multiplier of update ``t`` of the run; past the end it stays where the schedule ended."""
        t = min(t - self.first, self.total)
        if self.name == "stlr":
            return stlr(t, self.total)
        m = SCHEDULES[self.name](t, self.total, self.warmup_steps / self.total)
        warming_up = t < self.warmup_steps
        return m if warming_up else self.floor + (1.0 - self.floor) * m
