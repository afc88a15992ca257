"""When things happen in a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Intervals:
    """When things happen, in optimiser steps counted from ``first``; 0 means never."""

    total: int
    log: int
    evaluate: int
    save: int
    keep_last: int
    first: int = 0  # where this loop's part of the run begins
    save_evaluated: bool = False  # save after every evaluation as well
    compare_ranks: int = 0
    keep_weights: int = 0
    zeroshot: int = 0  # the first time; then at twice as many steps, and again


def due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def due_doubling(step: int, interval: int) -> bool:
    """Whether ``step`` is ``interval``, or 2, 4, 8, ... times that: evenly spaced on a logarithmic axis."""
    times, rest = divmod(step, interval) if interval else (0, 0)
    return times > 0 and rest == 0 and times & (times - 1) == 0
