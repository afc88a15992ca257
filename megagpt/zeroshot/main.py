"""``megagpt zeroshot``: tasks answered by a model that was not trained for them, and by the checkpoints of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from megagpt import dist
from megagpt.config.flags import parse_flags
from megagpt.data.storage import check_writable
from megagpt.errors import CheckpointError, ConfigError
from megagpt.evaluate.measure import ranks, say_checkpoint, table, write_figures
from megagpt.evaluate.progress import Progress
from megagpt.evaluate.source import Source, open_source
from megagpt.train import manifest
from megagpt.zeroshot.results import HEADER, measure, parse_references, table_row
from megagpt.zeroshot.scoring import LogProbs, option_scores, token_log_probs
from megagpt.zeroshot.tasks import Asked, Sequences, encode, load_tasks, parse_names
from megagpt.zeroshot.trajectory import check_folder, write_trajectory

ALIASES = {"run": "from"}
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class ZeroshotSettings:
    """Ask a language model tasks it was not trained for: megagpt zeroshot --from runs/gpt1 --task_data data/tasks"""

    task_data: str  # folder with the tasks' published files, or with a folder for each task
    from_: tuple[str, ...] = ()  # what megagpt generate takes: run folders, ...; several are also averaged
    trajectory: str | None = None  # instead: a run folder, of which all checkpoints and kept weights are asked
    tasks: tuple[str, ...] = ()  # cola, sst2, race, winograd, pdp60, copa; all whose files are there by default
    scoring: Literal["partial", "full"] = "partial"  # winograd, pdp60, copa: a part of the text, or all
    limit: int | None = None  # questions of each task, evenly spread over it; all by default
    references: tuple[str, ...] = ()  # TASK=PERCENT, which the normalised figures call 1; the paper's by default

    output: str | None = None  # of --trajectory: folder for trajectory.csv and trajectory.png; the run's by default
    json: str | None = None  # a file for all figures
    batch_size: int = 16  # texts at once on each rank
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic
    tokenizer: str | None = None  # a tokenizer.json; the run folder's by default

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value} must be at least 1")
        if bool(self.from_) == (self.trajectory is not None):
            raise ConfigError("megagpt zeroshot needs one of --from RUN [RUN ...] and --trajectory RUN")
        if self.output is not None and self.trajectory is None:
            raise ConfigError("--output is for --trajectory; the figures of --from go into --json FILE")
        parse_names(self.tasks)
        parse_references(self.references)

    @property
    def folder(self) -> Path:
        """Where --trajectory writes."""
        return Path(self.output or self.trajectory)


class _Read:
    """Tasks as models read them: those with the same tokenizer and context read the same."""

    def __init__(self, asked: list[Asked]) -> None:
        self.asked = asked
        self._found: dict[tuple[str, int], list[Sequences]] = {}

    def by(self, source: Source) -> list[Sequences]:
        tokenizer, context = source.tokenizer, source.config.seq_len
        key = (tokenizer.sha256, context)
        if key not in self._found:
            self._found[key] = [encode(task, tokenizer, context) for task in self.asked]
        return self._found[key]


def zeroshot_main(argv: Sequence[str] | None = None) -> int:
    """Run ``megagpt zeroshot``, on every rank where a launcher started several."""
    settings = parse_flags(ZeroshotSettings, argv, prog="megagpt zeroshot", aliases=ALIASES)
    if settings.json:
        check_writable(Path(settings.json))
    named, notes = (settings.from_, []) if settings.trajectory is None else kept_checkpoints(Path(settings.trajectory))
    sources = [open_source(name, tokenizer=settings.tokenizer) for name in named]
    asked = load_tasks(parse_names(settings.tasks), settings.task_data, scoring=settings.scoring, limit=settings.limit)
    read = _Read(asked)
    for source in sources:  # what cannot be asked is told before anything is computed
        read.by(source)
    if settings.trajectory is not None:
        check_folder(settings.folder)
    with ranks() as (world, device):
        for note in notes:
            _say(note)
        if settings.trajectory is None:
            figures = _models(settings, sources, read, world, device)
        else:
            figures = _checkpoints(settings, sources, read, world, device)
        if dist.is_main() and settings.json:
            about = {"task_data": settings.task_data, "scoring": settings.scoring, "dtype": settings.dtype}
            write_figures(Path(settings.json), {**about, **figures})
    return 0


def kept_checkpoints(run: Path) -> tuple[list[str], list[str]]:
    """The intact checkpoints of a run, oldest first, and a line for each other one. Raises CheckpointError.

    Where one is gone and its weights were kept, they are taken.
    """
    if manifest.step_of(run) is not None and run.exists():
        raise CheckpointError(f"--trajectory {run} is one checkpoint; give the run folder, or this one to --from")
    kept = {manifest.step_of(folder): str(folder) for folder in manifest.folders(run / manifest.KEPT_WEIGHTS)}
    found, notes = dict(kept), []
    for folder in manifest.folders(manifest.root_of(run)):
        reason, step = manifest.problem(folder), manifest.step_of(folder)
        if reason is None:
            found[step] = str(folder)
        else:
            instead = "; the weights that were kept of it are asked" if step in kept else ""
            notes.insert(0, f"skipped checkpoint {folder.name}: {reason}{instead}")
    if not found:
        raise CheckpointError(f"{notes[0]}, and there is no other") if notes else manifest.nothing_there(run)
    return [found[step] for step in sorted(found)], notes


def _models(settings: ZeroshotSettings, sources: list[Source], read: _Read, world, device) -> dict:
    """The figures of every model and, of several, of all together."""
    names = _names(settings.from_)
    sources = [source.settled() for source in sources]
    for name, source in zip(names, sources, strict=True):
        say_checkpoint(name, source)
    found = [_log_probs(settings, source, read, world, device) for source in sources]
    groups = {name: [log_probs] for name, log_probs in zip(names, found, strict=True)}
    if len(found) > 1:
        groups[ENSEMBLE] = found
    same = len({source.tokenizer.sha256 for source in sources}) == 1
    if len(found) > 1 and not same:
        _say("different tokenizers: the ensemble averages the options' scores, not the tokens' probabilities")
    models = {name: _measured(settings, read.asked, group, same) for name, group in groups.items()}
    several = len(models) > 1
    header = [*(["model"] if several else []), *HEADER]
    rows = [
        [*([name] if several else []), *table_row(task, figures)]
        for name, tasks in models.items()
        for task, figures in tasks.items()
    ]
    _say(table(header, rows))
    checkpoints = {name: source.checkpoint for name, source in zip(names, sources, strict=True)}
    return {"checkpoints": checkpoints, "models": models}


def _checkpoints(settings: ZeroshotSettings, sources: list[Source], read: _Read, world, device) -> dict:
    """The figures of every checkpoint, in a file for a spreadsheet and a picture too."""
    steps = []
    # A run that goes on saves and deletes meanwhile: rank 0 says which, and one that is gone at its turn is told.
    for path in dist.gather_json([str(source.path) for source in sources])[0]:
        try:
            source = dist.everywhere(partial(open_source, path, tokenizer=settings.tokenizer)).settled()
        except CheckpointError as error:
            _say(f"skipped checkpoint {Path(path).name}: {error}")
            continue
        tasks = _measured(settings, read.asked, [_log_probs(settings, source, read, world, device)], True)
        steps.append({"step": source.step, "tasks": tasks})
        scores = ", ".join(f"{name} {figures['score']:.2f}" for name, figures in tasks.items())
        _say(f"step {steps[-1]['step']:,}: {scores}")
    if not steps:
        raise CheckpointError(f"no checkpoint of {settings.trajectory} is left to be asked")
    if dist.is_main():
        for line in write_trajectory(steps, settings.folder, "trajectory"):
            _say(line)
    return {"run": settings.trajectory, "trajectory": steps}


def _log_probs(settings: ZeroshotSettings, source: Source, read: _Read, world, device) -> list[LogProbs]:
    """Of every task, with the model in memory for as long as it takes."""
    model = dist.everywhere(lambda: source.build(device, settings.dtype))
    place = {"rank": world.rank, "world_size": world.world_size}
    found = []
    for task, sequences in zip(read.asked, read.by(source), strict=True):
        told = Progress(f"{source.path}, {task.name}", len(sequences), "texts")
        found.append(token_log_probs(model, sequences, batch_size=settings.batch_size, **place, progress=told))
    return found


def _measured(settings: ZeroshotSettings, asked: list[Asked], models: list[list[LogProbs]], same: bool) -> dict:
    """{task: figures} of models together, each with the log-probabilities of every task."""
    references = parse_references(settings.references)
    found = {}
    for i, task in enumerate(asked):
        scores = option_scores(task, [log_probs[i] for log_probs in models], same_tokens=same)
        found[task.name] = measure(task, scores, references)
    return found


def _names(paths: Sequence[str]) -> list[str]:
    """Of models: their paths, with a number where one is named twice, or as all together are."""
    plain = [paths.count(path) == 1 and path != ENSEMBLE for path in paths]
    return [path if plain[i] else f"{path} ({i + 1})" for i, path in enumerate(paths)]


def _say(text: str) -> None:
    if dist.is_main():
        print(text, flush=True)
