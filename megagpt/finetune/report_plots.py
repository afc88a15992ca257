"""Fine-tuning results as pictures."""

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagpt.finetune.report import Line


def missing() -> str | None:
    """Why nothing can be drawn, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed (pip install 'megagpt[plots]')"
    return None


def plot_report(lines: Sequence[Line], path: Path) -> None:
    """Draw each task's first metric: a point for each seed, a bar at their median, the constant answer, the paper."""
    from matplotlib.figure import Figure

    firsts = {}  # the first line of a split is that of the task's first metric
    for line in lines:
        firsts.setdefault((line.task, line.split, line.variant), line)
    rows = list(firsts.values())
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for y, line in enumerate(rows):
        axes.plot(line.values, [y] * len(line.values), "o", color="tab:blue", alpha=0.5, markersize=5)
        axes.plot([line.median], [y], "|", color="tab:blue", markersize=16, markeredgewidth=2)
        if line.constant is not None:
            axes.plot([line.constant], [y], "x", color="0.5", markersize=6)
        if line.published is not None:
            axes.plot([line.published], [y], "D", color="tab:orange", markersize=5, fillstyle="none")
    for marker, colour, label in (
        ("o", "tab:blue", "a seed"),
        ("|", "tab:blue", "median"),
        ("x", "0.5", "constant answer"),
        ("D", "tab:orange", "published"),
    ):
        axes.plot([], [], marker, color=colour, label=label, fillstyle="none" if marker == "D" else "full")
    labels = [f"{line.task}/{line.split} {line.metric} ({line.variant})" for line in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("percent")
    _finish(axes)
    axes.legend(frameon=False, fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path)


def plot_curves(curves: Mapping[str, Mapping[float, Sequence[float]]], path: Path, *, x: str, y: str) -> None:
    """Draw, for each named curve, the median of the values at each x and their range.

    Positions that span more than a factor of ten are drawn on a logarithmic axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        xs = sorted(points)
        medians = [statistics.median(points[x]) for x in xs]
        (drawn,) = axes.plot(xs, medians, marker="o", markersize=4, linewidth=1.4, label=name)
        low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
        axes.fill_between(xs, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    positions = [x for points in curves.values() for x in points]
    if min(positions) > 0 and max(positions) > 10 * min(positions):
        axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    _finish(axes)
    figure.savefig(path)


def _finish(axes) -> None:
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
