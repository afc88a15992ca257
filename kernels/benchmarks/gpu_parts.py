"""The parts of the benchmark: what each measures, and each in a process of its own.

One that hangs, or breaks the device for its process, then costs the others neither their time nor their results.
"""

import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gpu_attention
import gpu_loss
import gpu_model
import gpu_peers
import gpu_rows
import torch
from gpu_clock import Clock, free
from gpu_measure import measure, measure_ceilings
from gpu_report import Report, rows_table, smi

# What is measured, and its share of the time when there is a limit.
PARTS = {
    "attention": (gpu_attention.problems, 0.3),
    "bias_gelu": (gpu_rows.gelu_problems, 0.06),
    "add_layer_norm": (gpu_rows.norm_problems, 0.1),
    "linear_cross_entropy": (gpu_loss.problems, 0.08),
    "model": (None, 0.46),
}
_ROUNDS = 3
_GRACE_S = 25  # for what has begun when the time of a part is over


def deadlines(parts: list[str], minutes: float) -> Iterator[tuple[str, float]]:
    """Each part, and the moment of time.monotonic() at which it starts nothing more; the next gets what one leaves."""
    deadline = time.monotonic()
    shares = sum(PARTS[part][1] for part in parts)
    for part in parts:
        deadline += PARTS[part][1] / shares * 60 * minutes
        yield part, deadline


def measure_apart(part: str, path: Path, deadline: float, flags: list[str]) -> None:
    """Measure ``part`` in another process, which adds to the report in the file ``path``."""
    left = deadline - time.monotonic()
    program = Path(__file__).parents[1] / "bench.py"
    command = [sys.executable, str(program), part, "--onto", str(path), "--minutes", str(left / 60), *flags]
    try:
        code = subprocess.run(command, timeout=None if left == float("inf") else max(left, 0) + _GRACE_S).returncode
        problem = f"its process ended with {code}" if code else ""
    except subprocess.TimeoutExpired:
        problem = f"it did not end {_GRACE_S} s after its time and was stopped"
    if problem:
        report = Report.read(path)
        report.failed.append(f"{part}: {problem}")
        report.write_json(path)


def measure_here(
    part: str,
    report: Report,
    device: torch.device,
    providers: tuple[str, ...],
    deadline: float,
    save: Callable[[], object],
    *,
    quick: bool,
) -> None:
    """Add what ``part`` measures to ``report``; ``save`` is called whenever there is more in it."""
    clock = Clock(device, **({"warmup_ms": 0, "rep_ms": 1} if quick else {}))
    report.ceilings = report.ceilings or measure_ceilings(clock)
    report.clocks.setdefault("before", smi("clocks.sm", "temperature.gpu"))
    if part == "model":
        steps = gpu_model.measure_models(clock, report, providers, deadline, quick=quick)
    else:
        makers = PARTS[part][0](device, providers, quick=quick)
        steps = _measure_problems(part, makers, clock, report, deadline, 1 if quick else _ROUNDS)
    for _ in steps:
        save()
    report.clocks["after"] = smi("clocks.sm", "temperature.gpu")
    save()


def _measure_problems(
    part: str, makers: Iterable[Callable], clock: Clock, report: Report, deadline: float, rounds: int
) -> Iterator[None]:
    """Measure problems until there are no more, or no time; yields after each."""
    for i, make in enumerate(makers):
        if time.monotonic() > deadline:
            report.skipped.append(f"{part}: everything from its problem {i + 1} on")
            return
        try:
            rows = measure(make(), clock, report.ceilings, rounds)
        except Exception as error:  # the rest is still worth measuring
            traceback.print_exc()
            report.failed.append(f"{part}, its problem {i + 1}: {gpu_peers.first_line(error)}")
            continue
        report.rows += rows
        print(f"\n{rows_table(row for row in rows if row['status'] == 'timed')}")
        print("\n".join(f"{row['provider']}: {row['reason']}" for row in rows if row["status"] != "timed"), flush=True)
        free(clock)
        yield
