"""What the benchmarks share: rounds in which the variants take turns, their medians and paired ratios, and reports.

Load from outside falls on neighbours alike when variants take turns, so a ratio is formed inside each round and the
median taken over the rounds; every other round runs backwards, so that nobody always comes first.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Spread:
    """The median of some values, their 20th and 80th percentiles, the lowest and the highest."""

    median: float
    p20: float
    p80: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.p20:.2f}-{self.p80:.2f})"


def spread(values: Iterable[float]) -> Spread:
    values = sorted(values)
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values
    return Spread(statistics.median(values), fifths[0], fifths[-1], values[0], values[-1])


def paired(values: list[float], others: list[float]) -> Spread:
    """values / others, round by round."""
    return spread(a / b for a, b in zip(values, others, strict=True))


def timed(work: Callable[[], object]) -> float:
    """The seconds that ``work`` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def interleave(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each variant's result (seconds, say) in each round."""
    results: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds):
        for name in list(variants)[:: -1 if round_ % 2 else 1]:
            results[name].append(variants[name]())
    return results


# -- the command line and the report


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="how often the variants take turns")
    parser.add_argument("--quick", action="store_true", help="one round of the smallest sizes: that it runs at all")
    parser.add_argument("--output", type=Path, help="folder for the figures as JSON and the tables as Markdown")
    return parser


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(*packages: str) -> dict:
    """The processor, the cores this process may use, and the versions of ``packages``."""
    versions = {name: version(name) for name in packages}
    return {"cpu": _processor(), "cores": cores(), "python": platform.python_version(), **versions}


def _processor() -> str:
    """The processor's name; Python itself knows none on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table with columns as wide as what is in them."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


class Report:
    """Prints sections as they are done, and keeps them for the files <name>.json and <name>.md of a folder."""

    def __init__(self, name: str, on: dict, folder: Path | None) -> None:
        self.name, self.folder = name, folder
        self.figures: dict = {"machine": on}
        self.sections = [f"# {name}", ", ".join(f"{key} {value}" for key, value in on.items())]
        print(self.sections[1], flush=True)

    def add(self, key: str, figures: dict, text: str) -> None:
        """One part of the measurement: its figures, stored under ``key``, and what is shown of them."""
        self.figures[key] = figures
        self.sections.append(text)
        print(f"\n{text}", flush=True)
        self._write()  # at once: a run that is stopped half-way has measured half

    def _write(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = json.dumps(self.figures, indent=2, default=asdict)
        (self.folder / f"{self.name}.json").write_text(plain + "\n", encoding="utf-8")
        (self.folder / f"{self.name}.md").write_text("\n\n".join(self.sections) + "\n", encoding="utf-8")
