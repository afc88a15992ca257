"""Which rank holds the others up.

All ranks take a step in the same time, for they wait for each other. What tells them apart is the time before the first
collective: waiting for data and the forward pass (under ZeRO-3 the forward pass waits too, and shows less).
"""

import socket
import statistics
import time

import torch

from megagpt import dist

_SLOW = 1.5  # times the median of the others
_WINDOW = 10  # steps at least over which a rank is compared
_IN_A_ROW = 2  # windows after which it is named: one may be chance


class RankTimes:
    """Milliseconds a step that each rank spends on its own; the loop calls :meth:`begin` and :meth:`end`."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple] = []
        self._slow: dict[int, int] = {}
        self._sums: list[float] = []  # of each rank over the steps of this window
        self._steps = 0
        self._device = device

    def begin(self) -> None:
        self._begun = self._now()

    def end(self) -> None:
        self._spans.append((self._begun, self._now()))

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _own_ms(self) -> float:
        """The sum over what was measured since the last call; the device has finished it."""
        spans, self._spans = self._spans, []
        return sum(begun.elapsed_time(ended) if self._on_gpu else 1e3 * (ended - begun) for begun, ended in spans)

    def gather(self, steps: int) -> tuple[dict[str, float], list[str]]:
        """Least, median and greatest of all ranks, and a line for each rank that begins to stand out.

        Every rank calls this, after ``steps`` steps.
        """
        from torch import distributed

        own = torch.tensor([self._own_ms() / steps], device=self._device)
        world_size = distributed.get_world_size()
        if world_size == 1:
            return {}, []
        found = [torch.empty_like(own) for _ in range(world_size)]
        distributed.all_gather(found, own)
        times = torch.cat(found).tolist()
        new, means = self._judge(times, steps)
        hosts = dist.gather_json(socket.gethostname()) if new else []
        lines = [
            f"WARNING: rank {r} on {hosts[r]} is slow: {means[r]:.1f} ms of data and forward pass a step, the others "
            f"{_median_without(means, r):.1f}"
            for r in new
        ]
        return {"min": min(times), "median": statistics.median(times), "max": max(times)}, lines

    def _judge(self, times: list[float], steps: int) -> tuple[list[int], list[float]]:
        """The ranks to be named after these steps, and each rank's mean in its window."""
        sums = self._sums or [0.0] * len(times)
        self._sums = [total + ms * steps for total, ms in zip(sums, times, strict=True)]
        self._steps += steps
        if self._steps < _WINDOW:
            return [], []
        means = [total / self._steps for total in self._sums]
        self._sums, self._steps = [], 0
        return self._stand_out(means), means

    def _stand_out(self, times: list[float]) -> list[int]:
        """The ranks that are slow for the second time in a row; each is named once until it has been fast again."""
        slow = [r for r, ms in enumerate(times) if ms > _SLOW * _median_without(times, r)]
        self._slow = {r: self._slow.get(r, 0) + 1 for r in slow}
        return [r for r in slow if self._slow[r] == _IN_A_ROW]


def _median_without(times: list[float], rank: int) -> float:
    return statistics.median([*times[:rank], *times[rank + 1 :]])
