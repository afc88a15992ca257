"""Several runs of one command: a run for each task of --task and each seed of --seeds, in folders of their own."""

import os
from dataclasses import replace

from megagpt.finetune.fields import FinetuneSettings
from megagpt.finetune.tasks import GLUE, find_task, home_of

_SETS = {"glue": tuple(task.name for task in GLUE)}


def runs_of(settings: FinetuneSettings) -> list[FinetuneSettings]:
    """The runs that ``settings`` ask for: RUN_DIR, RUN_DIR/TASK, RUN_DIR/seedN or RUN_DIR/TASK/seedN.

    Raises ConfigError for an unknown task and DataError where one of several has no files: all are looked for before
    the first run begins.
    """
    names = tasks_of(settings.task)
    runs = [replace(settings, task=names[0]) if names else settings]
    if len(names) > 1:
        for name in names:
            home_of(find_task(name), settings.task_data)
        runs = [replace(settings, task=name, run_dir=os.path.join(settings.run_dir, name)) for name in names]
    if not settings.seed_list:
        return runs
    return [
        replace(run, seed=seed, run_dir=os.path.join(run.run_dir, f"seed{seed}"), seeds=None)
        for run in runs
        for seed in settings.seed_list
    ]


def tasks_of(text: str | None) -> list[str]:
    """The names in ``--task``, each once: a name, several with commas between them, or ``glue``."""
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    return list(dict.fromkeys(name for word in words for name in _SETS.get(word, (word,))))
