"""What a benchmark leaves: every figure as JSON, the rows as CSV, and a summary for people."""

import csv
import json
import operator
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import timing
import torch
from gpu_goals import goals, goals_table
from gpu_measure import FIELDS, Ceilings


def describe(device: torch.device) -> dict:
    """The device and the versions of what runs on it."""
    on = {"python": platform.python_version(), "torch": torch.__version__, "triton": _triton()}
    if device.type != "cuda":
        return {"device": timing.machine()["cpu"], "threads": torch.get_num_threads(), **on}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "multiprocessors": found.multi_processor_count,
        "l2_mb": round(found.L2_cache_size / 2**20),
        "memory_gb": round(found.total_memory / 2**30),
        **on,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": smi("driver_version"),
    }


def smi(*fields: str) -> str:
    """Fields of the first GPU as nvidia-smi gives them, "unknown" without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "absent"
    interpreted = " (interpreted: times of kernels mean nothing)" if triton.knobs.runtime.interpret else ""
    return triton.__version__ + interpreted


@dataclass
class Report:
    """Everything that was measured."""

    on: dict
    ceilings: Ceilings | None = None  # before the first part has begun
    rows: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)  # whole training steps
    failed: list[str] = field(default_factory=list)  # what ended with an exception of this program's
    skipped: list[str] = field(default_factory=list)  # what there was no time for
    clocks: dict[str, str] = field(default_factory=dict)  # before and after

    @classmethod
    def read(cls, path: Path) -> "Report":
        """What :meth:`write_json` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        ceilings = fields.pop("ceilings")
        return cls(ceilings=Ceilings(**ceilings) if ceilings else None, **fields)

    def write_json(self, path: Path) -> None:
        """All of it or nothing: a process may be stopped at any time."""
        unfinished = path.with_name(f"{path.name}.unfinished")
        unfinished.write_text(json.dumps(_finite(asdict(self)), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def write_csv(self, path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)

    def summary(self) -> str:
        """Markdown."""
        parts = [
            "# Kernels, measured",
            ", ".join(f"{key} {value}" for key, value in self.on.items()),
            f"{self.ceilings or 'Ceilings were not measured.'} Clocks: {self.clocks}.",
            "A speed-up is the time of the fastest other provider over one's own, the median over rounds in which they "
            "took turns.",
        ]
        if found := goals(self.on["device"], self.rows, self.steps):
            parts += ["## Goals", goals_table(found)]
        timed = [row for row in self.rows if row["status"] == "timed"]
        for op in dict.fromkeys(row["op"] for row in timed):
            parts += [f"## {op}", rows_table(row for row in timed if row["op"] == op)]
        if self.steps:
            parts += ["## Whole training steps", steps_table(self.steps)]
        ours = sorted((r for r in timed if r["provider"] == "megagpt" and r["speedup"]), key=lambda r: r["speedup"])
        if ours:
            parts += ["## Where this project's kernels do worst", rows_table(ours[:12])]
        reasons = _reasons(self.rows)
        if reasons:
            parts += ["## Not timed", "\n".join(f"- {line}" for line in reasons)]
        if self.failed:
            parts += ["## Failed", "\n".join(f"- {line}" for line in self.failed)]
        if self.skipped:
            parts += ["## No time was left for", "\n".join(f"- {line}" for line in self.skipped)]
        return "\n\n".join(parts) + "\n"


def rows_table(rows) -> str:
    header = [
        "shape",
        "dtype",
        "dropout",
        "pass",
        "provider",
        "ms (20-80 %)",
        "TFLOP/s",
        "GB/s",
        "of floor",
        "speed-up",
    ]
    return timing.table(header, [_cells(row) for row in rows])


def _cells(row: dict) -> list[str]:
    speedup = f"{row['speedup']:.2f} of {row['best_peer']}" if row["speedup"] else ""
    return [
        f"{row['shape']} ({row['dims']})",
        row["dtype"],
        f"{row['dropout']:g}",
        row["pass"],
        row["provider"],
        f"{row['ms']:.4g} ({row['p20']:.4g}-{row['p80']:.4g})",
        f"{row['tflops']:.4g}" if row["tflops"] else "",
        f"{row['gb_per_s']:.4g}",
        f"{row['percent_of_floor']:.0f} % ({row['bound']})",
        speedup,
    ]


def steps_table(steps: list[dict]) -> str:
    """The times of those that were timed, then where each one's time goes, then who was not timed and why."""
    timed = [step for step in steps if step["status"] == "timed"]
    case = ["model", "dtype", "dropout", "backend"]
    header = [*case, "ms (20-80 %)", "tokens/s", "MFU", "speed-up", "MB"]
    parts = [timing.table(header, [_step_cells(step) for step in timed])]
    parts.append("\n".join(f"- {_step_name(step)}: {_where(step)}" for step in timed))
    rest = [step for step in steps if step["status"] != "timed"]
    if rest:
        parts.append("\n".join(f"- {_step_name(step)}: {step['reason']}" for step in rest))
    return "\n\n".join(parts)


def _step_cells(step: dict) -> list[str]:
    return [
        f"{step['model']} ({step['dims']})",
        step["dtype"],
        f"{step['dropout']:g}",
        step["backend"],
        f"{step['ms']:.4g} ({step['p20']:.4g}-{step['p80']:.4g})",
        f"{step['tokens_per_s']:.0f}",
        f"{100 * step['mfu']:.1f} %" if step["mfu"] else "",
        f"{step['speedup']:.2f} of {step['best_peer']}" if step["speedup"] else "",
        f"{step['peak_mb']:.0f}" if step["peak_mb"] else "",
    ]


def _step_name(step: dict) -> str:
    return f"{step['model']} {step['dtype']}, dropout {step['dropout']:g}, {step['backend']}"


def _where(step: dict) -> str:
    kinds = ", ".join(f"{kind} {ms:.3g} ms" for kind, ms in step["kinds"].items())
    kinds += f"; the projections alone would take {step['products_ms']:.3g} ms"
    without = ", ".join(f"{ms:+.3g} ms with torch's {op}" for op, ms in step["without"].items())
    return "; ".join(part for part in (kinds, without) if part)


def _reasons(rows: list[dict]) -> list[str]:
    """Who was not timed and why, each reason once."""
    found: dict[tuple, list[str]] = {}
    for row in rows:
        if row["status"] != "timed":
            shapes = found.setdefault((row["op"], row["provider"], row["reason"]), [])
            shapes.append(f"{row['shape']} {row['dtype']}")
    return [
        f"{op}, {provider}: {reason} ({shapes[0]}{f' and {len(shapes) - 1} more' if shapes[1:] else ''})"
        for (op, provider, reason), shapes in found.items()
    ]


def slower(report: Report, before: dict, factor: float = 1.07) -> list[str]:
    """What this project's kernels take more than ``factor`` times as long for as in an earlier report's JSON."""
    key = operator.itemgetter("op", "shape", "dims", "dtype", "dropout", "pass", "provider", "status")
    old = {key(row): row["ms"] for row in before["rows"]}
    lines = []
    for row in report.rows:
        ms = old.get(key(row))
        if row["provider"] == "megagpt" and row["status"] == "timed" and ms and row["ms"] > factor * ms:
            case = f"{row['op']} {row['shape']} {row['dtype']}, dropout {row['dropout']:g}, {row['pass']}"
            lines.append(f"{case}: {row['ms']:.4g} ms, {row['ms'] / ms:.2f} times the {ms:.4g} ms of before")
    return lines


def _finite(value):
    """``value`` with None for what JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and value - value != 0 else value
