"""Time the fused kernels beside everybody else's, in one process, and whole training steps with them.

    python kernels/bench.py [attention|bias_gelu|add_layer_norm|linear_cross_entropy|model|all ...]
        [--providers megagpt torch ...] [--json FILE] [--plot STEM] [--out FOLDER] [--quick] [--minutes 6]

Nothing is timed before its results agree with the definition in float64. Who is absent is listed with the reason.
Without a GPU the torch providers are timed on the CPU, at small shapes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks"), str(HERE.parent)]  # so that nothing needs to be installed

import gpu_peers  # noqa: E402
import gpu_plots  # noqa: E402
from gpu_parts import PARTS, deadlines, measure_apart, measure_here  # noqa: E402
from gpu_report import Report, describe, slower  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    report = Report.read(args.onto) if args.onto else Report(describe(device))
    if args.baseline and args.baseline["on"]["device"] != report.on["device"]:
        print(
            f"error: the baseline is of {args.baseline['on']['device']}, and this is {report.on['device']}: times of "
            "two devices cannot be compared; leave --baseline out",
            file=sys.stderr,
        )
        return 2
    if not args.onto:
        if device.type != "cuda":
            print("no GPU here: the torch providers are timed on the CPU, at small shapes")
        print(", ".join(f"{key} {value}" for key, value in report.on.items()), flush=True)
    report = _measure(args, report, device)
    if args.onto:
        return 0  # what failed stands in the report
    if not report.rows and not report.steps and not report.skipped:
        report.failed.append("nothing was measured; --providers may name none of those that are there")
    for path in _write(report, args):
        print(f"wrote {path}")
    complaints = [*report.failed, *(slower(report, args.baseline) if args.baseline else [])]
    for line in complaints:
        print(f"error: {line}", file=sys.stderr)
    return 1 if complaints else 0


def _measure(args: argparse.Namespace, report: Report, device: torch.device) -> Report:
    """The report with all parts in it, in a file all the time: a run that is stopped half-way has measured half."""
    with tempfile.TemporaryDirectory() as folder:
        path = args.onto or (args.out / "bench.json" if args.out else args.json) or Path(folder, "bench.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        report.write_json(path)
        for part, deadline in deadlines(args.parts, args.minutes):
            if len(args.parts) == 1:
                save = lambda: report.write_json(path)  # noqa: E731
                measure_here(part, report, device, args.providers, deadline, save, quick=args.quick)
            else:
                flags = ["--providers", *args.providers, *["--quick"] * args.quick]
                measure_apart(part, path, deadline, flags)
        return Report.read(path)


def _write(report: Report, args: argparse.Namespace) -> list[Path]:
    """Whatever files were asked for."""
    written = []
    stems = [args.plot.with_suffix("")] if args.plot else []
    if args.json:
        report.write_json(args.json)
        written.append(args.json)
    if args.out:
        report.write_json(args.out / "bench.json")
        report.write_csv(args.out / "bench.csv")
        (args.out / "summary.md").write_text(report.summary(), encoding="utf-8")
        written += [args.out / name for name in ("bench.json", "bench.csv", "summary.md")]
        stems.append(args.out / "bench")
    for stem in stems:
        drawn = gpu_plots.draw(report, stem)
        written += drawn
        if not drawn:
            print("no pictures: nothing was timed, or matplotlib is absent (pip install matplotlib)")
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
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin nothing new after this time; list what is left out"
    )
    parser.add_argument("--baseline", type=_earlier, help="an earlier bench.json: fail where it was 7 % faster or more")
    parser.add_argument(
        "--onto", type=Path, help="an unfinished bench.json of this machine, to which one part is added"
    )
    args = parser.parse_args(argv)
    args.providers = tuple(args.providers)
    asked = [args.parts] if isinstance(args.parts, str) else args.parts
    args.parts = list(PARTS) if "all" in asked else [part for part in PARTS if part in asked]
    if args.onto and len(args.parts) > 1:
        parser.error("--onto takes one part at a time")
    return args


def _earlier(path: str) -> dict:
    return json.loads(Path(path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
