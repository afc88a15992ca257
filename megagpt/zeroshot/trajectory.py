"""How tasks are learnt on the way, without training for them: figures over updates as a table and as a picture.

The picture is Figure 2 (right) of Radford et al. 2018: over the number of updates, on a logarithmic axis, every task's
performance with 0 for a random guess and 1 for the best single model that is known, and their mean.
"""

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from megagpt.data.storage import check_writable, storage_errors, write_atomically

COLUMNS = ("step", "task", "metric", "score", "random", "reference", "normalised", "n")


def check_folder(folder: Path) -> None:
    """Make ``folder`` where it is not there. Raises StorageError where it cannot be made or written into."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / "trajectory.csv")


def write_trajectory(steps: Sequence[dict], folder: Path, name: str) -> list[str]:
    """Write ``name``.csv and ``name``.png into ``folder``; a line for the user about each.

    ``steps`` are {"step": number of updates, "tasks": {task: what ``results.measure`` gives}}. Raises StorageError.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for found in steps:
        for task, figures in found["tasks"].items():
            row = {"step": found["step"], "task": task, **figures}
            writer.writerow([row.get(column, "") for column in COLUMNS])
    write_atomically(folder / f"{name}.csv", text.getvalue().encode())
    path, reason = plot(steps, folder / f"{name}.png")
    return [f"figures: {folder / f'{name}.csv'}", f"picture: {path}" if path else f"no picture: {reason}"]


def curves(steps: Sequence[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """{task: (updates, normalised)} of the tasks with a reference, from the first update on: 0 has no logarithm."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for entry in steps:
        for task, figures in entry["tasks"].items():
            if entry["step"] > 0 and "normalised" in figures:
                x, y = found.setdefault(task, ([], []))
                x.append(entry["step"])
                y.append(figures["normalised"])
    return found


def plot(steps: Sequence[dict], path: Path) -> tuple[Path | None, str | None]:
    """Draw the curves to ``path``; the path, or None and the reason why not."""
    drawn = curves(steps)
    if not drawn:
        return None, "no task with a reference was asked after an update; --references TASK=PERCENT gives one"
    if importlib.util.find_spec("matplotlib") is None:
        return None, "matplotlib is not installed (pip install 'megagpt[plots]')"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for task, (x, y) in drawn.items():
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.2, label=task)
    x, y = _mean(drawn)
    if len(drawn) > 1:
        axes.plot(x, y, color="0.2", linewidth=2.2, label="mean")
    axes.set_xscale("log")
    axes.set_xlabel("pre-training updates")
    axes.set_ylabel("relative task performance")
    axes.axhline(0.0, color="0.7", linewidth=0.8, linestyle="--")  # a random guess
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path)
    except OSError as error:
        return None, f"{path} cannot be written ({error.strerror})"
    return path, None


def _mean(drawn: dict[str, tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """The mean over tasks at every number of updates at which all were asked."""
    at = [dict(zip(x, y, strict=True)) for x, y in drawn.values()]
    common = sorted(set.intersection(*(set(found) for found in at)))
    return common, [sum(found[step] for found in at) / len(at) for step in common]
