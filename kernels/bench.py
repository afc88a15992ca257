"""Time the fused kernels beside everybody else's, in one process, and whole training steps with them.

    python kernels/bench.py [attention|bias_gelu|add_layer_norm|linear_cross_entropy|model|all ...]
        [--providers megagpt torch ...] [--json FILE] [--plot STEM] [--out FOLDER] [--quick] [--minutes 6]

Nothing is timed before its results agree with the definition in float64. Who is absent is listed with the reason.
Without a GPU the torch providers are timed on the CPU, at small shapes.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks"), str(HERE.parent)]  # so that nothing needs to be installed

import gpu_attention  # noqa: E402
import gpu_loss  # noqa: E402
import gpu_model  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_plots  # noqa: E402
import gpu_rows  # noqa: E402
from gpu_clock import Clock, free  # noqa: E402
from gpu_measure import measure, measure_ceilings  # noqa: E402
from gpu_report import Report, describe, rows_table, slower, smi  # noqa: E402

# What is measured, and its share of the time when there is a limit.
PARTS = {
    "attention": (gpu_attention.problems, 0.3),
    "bias_gelu": (gpu_rows.gelu_problems, 0.06),
    "add_layer_norm": (gpu_rows.norm_problems, 0.1),
    "linear_cross_entropy": (gpu_loss.problems, 0.08),
    "model": (None, 0.46),
}
ROUNDS = 3


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    if device.type != "cuda":
        print("no GPU here: the torch providers are timed on the CPU, at small shapes")
    clock = Clock(device, **({"warmup_ms": 0, "rep_ms": 1} if args.quick else {}))
    report = Report(describe(device), measure_ceilings(clock))
    if args.baseline and args.baseline["on"]["device"] != report.on["device"]:
        print(
            f"error: the baseline is of {args.baseline['on']['device']}, and this is {report.on['device']}: times of "
            "two devices cannot be compared; leave --baseline out",
            file=sys.stderr,
        )
        return 2
    report.clocks["before"] = smi("clocks.sm", "temperature.gpu")
    print(", ".join(f"{key} {value}" for key, value in report.on.items()), flush=True)
    for part, deadline in _deadlines(args.parts, args.minutes):
        if part == "model":
            gpu_model.measure_models(clock, report, args.providers, deadline, quick=args.quick)
        else:
            makers = PARTS[part][0](device, args.providers, quick=args.quick)
            run(part, makers, clock, report, deadline, 1 if args.quick else ROUNDS)
        _write(report, args)  # at once: a run that is stopped half-way has measured half
    report.clocks["after"] = smi("clocks.sm", "temperature.gpu")
    for path in _write(report, args, plots=True):
        print(f"wrote {path}")
    complaints = [*report.failed, *(slower(report, args.baseline) if args.baseline else [])]
    for line in complaints:
        print(f"error: {line}", file=sys.stderr)
    return 1 if complaints else 0


def run(part: str, makers: Iterable[Callable], clock: Clock, report: Report, deadline: float, rounds: int) -> None:
    """Measure the problems of one part until there are no more, or no time."""
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


def _deadlines(parts: list[str], minutes: float | None) -> Iterable[tuple[str, float]]:
    """Each part, and the moment at which it starts nothing more; what one leaves over goes to the next."""
    deadline = time.monotonic()
    shares = sum(PARTS[part][1] for part in parts)
    for part in parts:
        deadline += PARTS[part][1] / shares * 60 * minutes if minutes else float("inf")
        yield part, deadline


def _write(report: Report, args: argparse.Namespace, *, plots: bool = False) -> list[Path]:
    """Whatever files were asked for."""
    written = []
    stems = [args.plot.with_suffix("")] if args.plot else []
    if args.json:
        report.write_json(args.json)
        written.append(args.json)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        report.write_json(args.out / "bench.json")
        report.write_csv(args.out / "bench.csv")
        (args.out / "summary.md").write_text(report.summary(), encoding="utf-8")
        written += [args.out / name for name in ("bench.json", "bench.csv", "summary.md")]
        stems.append(args.out / "bench")
    if plots:
        for stem in stems:
            written += gpu_plots.draw(report, stem)
    return written


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, "all"], default="all", metavar="part", help=", ".join(PARTS)
    )
    parser.add_argument("--providers", nargs="+", choices=gpu_peers.PROVIDERS, default=gpu_peers.PROVIDERS)
    parser.add_argument("--json", type=Path, help="file for every figure")
    parser.add_argument("--plot", type=Path, help="pictures go to this name with -<operation>.png added")
    parser.add_argument("--out", type=Path, help="folder for bench.json, bench.csv, summary.md and the pictures")
    parser.add_argument("--quick", action="store_true", help="one round at the smallest shape: that everything runs")
    parser.add_argument("--minutes", type=float, help="begin nothing new after this time; what is left out is listed")
    parser.add_argument("--baseline", type=_earlier, help="an earlier bench.json: fail where it was 7 % faster or more")
    args = parser.parse_args(argv)
    args.providers = tuple(args.providers)
    asked = [args.parts] if isinstance(args.parts, str) else args.parts
    args.parts = list(PARTS) if "all" in asked else [part for part in PARTS if part in asked]
    return args


def _earlier(path: str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
