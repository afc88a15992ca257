"""How far a long computation has come, told now and then."""

import sys
import time

from megagpt import dist

_EVERY = 10.0  # seconds


class Progress:
    """Called with how many of ``total`` are done, rank 0 tells it on stderr, every ten seconds at most.

    What is done sooner says nothing.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._told = time.monotonic()

    def __call__(self, done: int) -> None:
        if dist.is_main() and done < self._total and time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            print(f"{self._what}: {done:,} of {self._total:,} {self._unit}", file=sys.stderr, flush=True)
