"""Milliseconds and memory of work on a device: events on a GPU whose caches are cold, the wall clock on a CPU."""

import gc
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]

_FLUSH_BYTES = 256 * 2**20  # more than any GPU's L2
_MOST_RUNS = 500


class Clock:
    """Times single runs of work. ``warmup_ms`` and ``rep_ms`` say how long one call of :meth:`samples` goes on."""

    def __init__(self, device: torch.device, *, warmup_ms: float = 10, rep_ms: float = 30) -> None:
        self.device, self.warmup_ms, self.rep_ms = device, warmup_ms, rep_ms
        self.on_gpu = device.type == "cuda"
        # Overwritten before every run, so that nothing is read from the cache that the run before left it in.
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if self.on_gpu else None

    def samples(self, work: Work) -> list[float]:
        """Milliseconds of each of several runs."""
        estimate = min(self.runs(work, 2))
        warm, n = (min(_MOST_RUNS, int(ms / max(estimate, 1e-3))) for ms in (self.warmup_ms, self.rep_ms))
        for _ in range(warm):
            work()
        return self.runs(work, max(n, 3))

    def first(self, work: Work) -> float:
        """Seconds of a first run: compilation and all."""
        begun = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begun

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak_mb(self, work: Work) -> float | None:
        """MB that ``work`` allocates beyond what there was; None on a CPU, where torch does not count."""
        if not self.on_gpu:
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        work()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def graph(self, work: Work) -> Work | None:
        """``work`` recorded as a CUDA graph, which runs without launching from Python; None where that fails."""
        if not self.on_gpu:
            return None
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError:
            return None
        return graph.replay

    def runs(self, work: Work, n: int) -> list[float]:
        """Milliseconds of each of ``n`` runs."""
        if not self.on_gpu:
            return [1e3 * self.first(work) for _ in range(n)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            work()
            end.record()
        self.wait()
        return [begin.elapsed_time(end) for begin, end in events]


def free(clock: Clock) -> None:
    """Give back memory, and forget what was compiled for other shapes."""
    torch._dynamo.reset()
    gc.collect()
    if clock.on_gpu:
        torch.cuda.empty_cache()
