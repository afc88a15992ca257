"""Which samples a rank trains on in which micro-step, and fetching them one ahead of the computation."""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_AHEAD = 2  # micro-batches prepared while one is computed: page-ins of a cold file hide behind the step


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: micro-batch x accumulation x ranks. The samples of a step don't depend on the cut."""

    micro_batch: int
    accumulation: int
    world_size: int
    rank: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.accumulation * self.world_size

    def indices(self, first: int, micro_step: int) -> np.ndarray:
        """The sample numbers of this rank in a micro-step of the global batch that starts at sample ``first``."""
        start = first + (micro_step * self.world_size + self.rank) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


def without(left_out: list[list[int]], indices: np.ndarray) -> np.ndarray:
    """The samples that have the numbers ``indices`` (int64, any shape) when those ``left_out`` are not counted.

    With [4, 8) left out the samples 3, 4, 5 are 3, 8, 9.
    """
    for first, end in left_out:
        indices = np.where(indices >= first, indices + (end - first), indices)
    return indices


def ranges(samples: np.ndarray) -> list[list[int]]:
    """Ascending numbers as ranges [first, end)."""
    if not len(samples):
        return []
    cuts = np.flatnonzero(np.diff(samples) != 1) + 1
    return [[int(part[0]), int(part[-1]) + 1] for part in np.split(samples, cuts)]


class MicroBatches:
    """Endless micro-batches from sample ``first`` on, each int64 (micro_batch, T + 1) on ``device``.

    Samples ``left_out``, ranges [first, end) in their order, are not counted. ``wait_s`` adds up the seconds the caller
    waited for data.
    """

    def __init__(
        self, windows, plan: BatchPlan, first: int, device: torch.device, left_out: list[list[int]] = ()
    ) -> None:
        self._windows = windows
        self._left_out = left_out
        self._plan = plan
        self._device = device
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._order = self._micro_steps(first)
        self._pending: deque = deque(self._submit() for _ in range(_AHEAD))
        self.wait_s = 0.0

    def _micro_steps(self, first: int) -> Iterator[np.ndarray]:
        while True:
            for micro_step in range(self._plan.accumulation):
                yield self._plan.indices(first, micro_step)
            first += self._plan.global_batch

    def _submit(self):
        return self._pool.submit(self._fetch, next(self._order))

    def _fetch(self, indices: np.ndarray) -> Tensor:
        batch = torch.from_numpy(self._windows.batch(without(self._left_out, indices)))
        return batch.pin_memory() if self._device.type == "cuda" else batch

    def next(self) -> Tensor:
        """The next micro-batch; what went wrong while it was read is raised here."""
        begun = time.perf_counter()
        batch = self._pending.popleft().result()
        self._pending.append(self._submit())
        self.wait_s += time.perf_counter() - begun
        return batch.to(self._device, non_blocking=True)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
