"""How far a long computation has come, told now and then."""

import sys
import time
from datetime import timedelta

from megagpt import dist

_EVERY = 10.0  # seconds


class Progress:
    """Called with how many of ``total`` are done, rank 0 tells it with the time to the end, on stderr.

    Every ten seconds at most; what is done sooner says nothing.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._begun = self._told = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if dist.is_main() and 0 < done < self._total and now - self._told >= _EVERY:
            self._told = now
            eta = timedelta(seconds=round((now - self._begun) / done * (self._total - done)))
            line = f"{self._what}: {done:,} of {self._total:,} {self._unit} | eta: {eta}"
            print(line, file=sys.stderr, flush=True)
