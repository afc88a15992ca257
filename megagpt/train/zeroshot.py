"""Tasks that a run is asked on its way, without being trained for them: the one place where training knows of tasks."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.config.fields import TrainSettings
from megagpt.errors import ConfigError, MegaGPTError
from megagpt.train import metrics
from megagpt.train.corpus import Corpora

if TYPE_CHECKING:
    from megagpt.zeroshot.tasks import Asked, Sequences

_PREFIX = "zeroshot/"  # of what metrics.jsonl and the monitors call the figures


@dataclass(frozen=True)
class Probe:
    """The tasks of a run, with their questions as the model reads them."""

    asked: "list[Asked]"
    sequences: "list[Sequences]"

    def run(self, model, *, batch_size: int, rank: int, world_size: int) -> dict[str, dict]:
        """{task: figures} of ``model``, a ``GPT`` in evaluation mode, the same on every rank, which all call this."""
        from megagpt.zeroshot.results import measure
        from megagpt.zeroshot.scoring import option_scores, token_log_probs

        found = {}
        for task, sequences in zip(self.asked, self.sequences, strict=True):
            scored = token_log_probs(model, sequences, batch_size=batch_size, rank=rank, world_size=world_size)
            found[task.name] = measure(task, option_scores(task, [scored]), {})
        return found


def open_probe(settings: TrainSettings, corpora: Corpora, context: int) -> Probe | None:
    """What ``--zeroshot_interval`` asks a model of ``context`` positions; None without that flag.

    Raises ConfigError or DataError for tasks that are unknown, not there, or do not fit the model.
    """
    if not settings.zeroshot_interval:
        return None
    from megagpt.data.tokenizer import from_file
    from megagpt.zeroshot.tasks import encode, load_tasks, parse_names

    tokenizer = Path(f"{corpora.parts[0].prefix}.tokenizer.json")
    if not tokenizer.is_file():
        raise ConfigError(
            f"--zeroshot_interval needs the corpus's tokenizer, {tokenizer}, which is not there; bring it back, or "
            "leave the flag out"
        )
    try:
        names = parse_names(settings.zeroshot_tasks)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--tasks", "--zeroshot_tasks", 1)) from None
    asked = load_tasks(names, settings.zeroshot_data, limit=settings.zeroshot_limit, flag="--zeroshot_data")
    reader = from_file(tokenizer)
    return Probe(asked, [encode(task, reader, context) for task in asked])


def as_record(results: dict[str, dict]) -> dict[str, float]:
    """The numbers of :meth:`Probe.run` under the names that the log has for them."""
    return {
        f"{_PREFIX}{task}/{key}": value
        for task, figures in results.items()
        for key, value in figures.items()
        if isinstance(value, int | float)
    }


def write_trajectory(run_dir: Path, probe: Probe) -> list[str]:
    """zeroshot.csv and zeroshot.png from the log of the whole run, its earlier starts too; a line about each.

    A disk that is full is told: the run has its checkpoints, and ``megagpt zeroshot --trajectory`` has the figures.
    """
    from megagpt.zeroshot import trajectory

    metric = {task.name: task.heuristic.metric for task in probe.asked}
    steps = []
    for record in metrics.read(run_dir / metrics.NAME):
        tasks: dict[str, dict] = {}
        for key, value in record.items():
            if key.startswith(_PREFIX):
                task, name = key.removeprefix(_PREFIX).split("/")
                tasks.setdefault(task, {"metric": metric.get(task, "")})[name] = value
        if tasks:
            steps.append({"step": record["step"], "tasks": tasks})
    try:
        return trajectory.write_trajectory(steps, run_dir, "zeroshot")
    except (MegaGPTError, OSError) as error:
        return [f"WARNING: zeroshot.csv cannot be written ({error})"]
