"""``megagpt tasks``: the tasks known by name, with what is there of them in a folder of data."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megagpt.config.flags import parse_flags
from megagpt.errors import DataError
from megagpt.finetune.papers import published
from megagpt.finetune.score import constant_baselines
from megagpt.finetune.tasks import TASKS, Task, find_folder, find_task, load_task


@dataclass(frozen=True)
class ListSettings:
    """List the tasks that finetune.py knows by name: megagpt tasks --task_data DIR"""

    task_data: str | None = None  # folder of the tasks' folders, to show what is there and how much
    task: str | None = None  # this one only; with --task_data also its constant answers' scores


def tasks_main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each task; its exit code, 0."""
    settings = parse_flags(ListSettings, argv, prog="megagpt tasks")
    if settings.task:
        _print([find_task(settings.task)], settings.task_data)
        if settings.task_data:
            print(_constants(settings.task, settings.task_data))
        return 0
    _print(list(TASKS.values()), settings.task_data)
    return 0


def _print(tasks: list[Task], folder: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "kind", "metric", box=None, pad_edge=False)
    if folder:
        for name in ("train", "validation"):
            table.add_column(name, justify="right")
    table.add_column("GPT-1", justify="right")
    table.add_column("source", no_wrap=True)
    problems: list[str] = []
    for task in tasks:
        paper = published(task.name, next(iter(task.valid), "dev"))
        sizes = _sizes(task, folder, problems) if folder else ()
        table.add_row(task.name, task.kind, task.metrics[0], *sizes, f"{paper:.1f}" if paper else "", task.source)
    # A line stays a line where nobody looks at it: files and pipes have no width.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for problem in problems:
        print(problem)


def _sizes(task: Task, folder: str, problems: list[str]) -> tuple[str, str]:
    """Numbers of examples; dashes where the task is not in ``folder``; a note in ``problems`` if it cannot be read."""
    if find_folder(task, folder) is None:
        return "-", "-"
    try:
        data = load_task(task.name, folder)
    except DataError as error:
        problems.append(f"{task.name} cannot be read: {error}")
        return "?", "?"
    valid = " + ".join(f"{len(split):,}" for split in data.valid.values())
    return f"{len(data.train):,}", valid


def _constants(name: str, folder: str) -> str:
    lines = ["", "constant answer, chosen on train:"]
    for split, values in constant_baselines(load_task(name, folder)).items():
        lines.append(f"  {split}: " + ", ".join(f"{metric} {100 * value:.2f}" for metric, value in values.items()))
    return "\n".join(lines)
