"""The ceilings of a device, and the times of a problem's providers beside them."""

import statistics
from dataclasses import dataclass

import timing
import torch
from gpu_clock import Clock
from gpu_problem import Problem, judge

_GRAPH_BELOW_MS = 0.1  # shorter work is also timed as a CUDA graph: what is left is not Python's


@dataclass(frozen=True)
class Ceilings:
    """What this device does at best, measured in this process."""

    copy_bytes_per_s: float  # read and written
    matmul_flops: dict[str, float]  # FLOP/s by dtype

    def floor_ms(self, problem: Problem, which: str) -> tuple[float, str]:
        """The least time of a pass, and whether "memory" or "matmul" sets it."""
        memory = 1e3 * problem.bytes[which] / self.copy_bytes_per_s
        matmul = 1e3 * problem.flops.get(which, 0.0) / self.matmul_flops[name_of(problem.dtype)]
        return max((memory, "memory"), (matmul, "matmul"))

    def __str__(self) -> str:
        rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {name}" for name, rate in self.matmul_flops.items())
        return (
            f"Ceilings, measured in the same run: copy {self.copy_bytes_per_s / 1e9:.4g} GB/s read and written; "
            f"products of square matrices {rates}."
        )


def name_of(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def measure_ceilings(clock: Clock) -> Ceilings:
    """A large copy and large square products of random numbers, medians."""
    numbers, side = (2**32 // 4, 8192) if clock.on_gpu else (2**24, 512)
    bytes_per_s = 2 * 4 * numbers / _seconds(clock, torch.Tensor.copy_, *torch.randn(2, numbers, device=clock.device))
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        flops[name_of(dtype)] = 2 * side**3 / _seconds(clock, torch.matmul, a, b)
    return Ceilings(bytes_per_s, flops)


def _seconds(clock: Clock, function, *args) -> float:
    return 1e-3 * statistics.median(clock.samples(lambda: function(*args)))


def measure(problem: Problem, clock: Clock, ceilings: Ceilings, rounds: int) -> list[dict]:
    """A row for each pass and provider; who is absent, refuses or is wrong has a reason in place of times."""
    base = {
        "op": problem.op,
        "shape": problem.shape,
        "dims": " ".join(f"{key}{value}" for key, value in problem.dims.items()),
        "dtype": name_of(problem.dtype),
        "dropout": problem.dropout,
    }
    rows = [_row(base, "", name, status="absent", reason=reason) for name, reason in problem.absent.items()]
    verdicts = judge(problem)
    for name, verdict in verdicts.items():
        if not verdict.ok:
            status = verdict.reason.partition(":")[0]
            rows.append(_row(base, "", name, status=status, reason=verdict.reason, error=verdict.error))
    good = [name for name, verdict in verdicts.items() if verdict.ok]
    for which in problem.passes:
        rows += _measure_pass(problem, which, good, verdicts, clock, ceilings, rounds, base)
    return rows


def _measure_pass(problem, which, names, verdicts, clock, ceilings, rounds, base) -> list[dict]:
    works = {name: problem.work(problem.providers[name], which) for name in names}
    first = {name: clock.first(work) for name, work in works.items()}
    samples = timing.interleave({name: _sampler(clock, work) for name, work in works.items()}, rounds)
    floor, bound = ceilings.floor_ms(problem, which)
    medians = {name: [statistics.median(values) for values in each] for name, each in samples.items()}
    rows = []
    for name in names:
        everything = sorted(value for each in samples[name] for value in each)
        ms = statistics.median(everything)
        row = {
            "ms": ms,
            "p20": everything[int(0.2 * (len(everything) - 1))],
            "p80": everything[round(0.8 * (len(everything) - 1))],
            "noise": (max(medians[name]) - min(medians[name])) / ms,
            "floor_ms": floor,
            "bound": bound,
            "percent_of_floor": 100 * floor / ms,
            "gb_per_s": 1e-6 * problem.bytes[which] / ms,
            "tflops": 1e-9 * problem.flops.get(which, 0.0) / ms,
            "extra_mb": clock.peak_mb(works[name]),
            "first_s": first[name],
            "error": verdicts[name].error,
            "error_limit": verdicts[name].limit,
            **against_peers(name, medians),
        }
        if which == "forward" and ms < _GRAPH_BELOW_MS and (replay := clock.graph(works[name])):
            row["graph_ms"] = statistics.median(clock.samples(replay))
        rows.append(_row(base, which, name, status="timed", **row))
    return rows


def _sampler(clock: Clock, work):
    return lambda: clock.samples(work)


def against_peers(name: str, medians: dict[str, list[float]]) -> dict:
    """The fastest of the others, and how many times as fast as it this one is, round by round.

    What stands behind a comma in a name is a variant of the same provider.
    """
    family = name.partition(",")[0]
    others = {
        other: statistics.median(values) for other, values in medians.items() if other.partition(",")[0] != family
    }
    if not others:
        return {}
    best = min(others, key=others.get)
    ratio = timing.paired(medians[best], medians[name])
    return {"best_peer": best, "speedup": ratio.median, "speedup_low": ratio.low, "speedup_high": ratio.high}


FIELDS = (
    *("op", "shape", "dims", "dtype", "dropout", "pass", "provider", "status", "reason"),
    *("ms", "p20", "p80", "noise", "floor_ms", "bound", "percent_of_floor", "gb_per_s", "tflops"),
    *("best_peer", "speedup", "speedup_low", "speedup_high", "extra_mb", "graph_ms", "first_s", "error", "error_limit"),
)


def _row(base: dict, which: str, provider: str, **values) -> dict:
    """Every field, in order; None where it does not apply."""
    row = {**base, "pass": which, "provider": provider, **values}
    return {name: row.get(name) for name in FIELDS}
