"""Fine-tuning runs side by side: a table of median and spread over seeds, beside constant answers and the paper."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import DataError
from megagpt.finetune.papers import published
from megagpt.finetune.score import METRICS

_HEADS = {"ulmfit": "pooled_mlp", "feature": "scalar_mix"}  # that go with a recipe
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")  # those of the paper's average


@dataclass(frozen=True)
class Run:
    """What a finished run says of itself in summary.json."""

    folder: Path
    task: str
    variant: str  # what was done otherwise than in the paper, or "full"
    settings: tuple[float, int]  # the last phase's rate, and epochs over the task
    seed: int
    train_examples: int
    metrics: dict[str, dict[str, float]]  # of the best checkpoint: split, metric
    constant: dict[str, dict[str, float]]  # the same of the best constant answer
    examples: dict[str, int]  # of each split
    summary: dict


@dataclass(frozen=True)
class Line:
    """A line of the table: one metric of one split, over the seeds of one variant. Percentages, except for errors."""

    task: str
    split: str
    variant: str
    metric: str
    values: tuple[float, ...]  # one a seed, ascending
    constant: float | None
    published: float | None
    train_examples: int

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def find_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The finished runs in ``folders`` and directly below them. Raises DataError where there is none."""
    runs = []
    for folder in map(Path, folders):
        places = [folder] if (folder / "summary.json").exists() else sorted(folder.glob("*/"))
        runs += [run for place in places if (run := read_run(place)) is not None]
    if not runs:
        raise DataError(f"{', '.join(map(str, folders))[:200]}: no finished fine-tuning run; give run folders")
    return runs


def read_run(folder: Path) -> Run | None:
    """The run in ``folder``; None where there is no summary of a fine-tuning run."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):  # Python 3.10 finds files beside the folders of runs too
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; run the fine-tuning again") from None
    if not isinstance(summary, dict) or not {"task", "metrics"} <= set(summary):
        return None
    return Run(
        folder=folder,
        task=summary["task"],
        variant=variant_of(summary),
        settings=(summary.get("lr", 0.0), summary.get("epochs", 0)),
        seed=summary.get("seed", 0),
        train_examples=summary.get("train_examples", 0),
        metrics=_scores(summary["metrics"]),
        constant=summary.get("constant", {}),
        examples=summary.get("examples", {}),
        summary=summary,
    )


def _scores(metrics: dict[str, dict]) -> dict[str, dict[str, float]]:
    """The scores of the splits that have labels, without their loss."""
    scores = {split: {name: v for name, v in found.items() if name != "loss"} for split, found in metrics.items()}
    return {split: found for split, found in scores.items() if found}


def variant_of(summary: dict) -> str:
    """What a run did otherwise than the paper's recipe, in words."""
    words = []
    paper_recipe = summary.get("recipe", "gpt1") == "gpt1"
    n_layer = summary.get("n_layer")
    if summary.get("backbone") == "lstm":
        words.append("LSTM")
    if not paper_recipe:
        words.append(str(summary["recipe"]))
    usual = _HEADS.get(summary.get("recipe", "gpt1"), "linear")
    if summary.get("head", usual) != usual:
        words.append(f"head {summary['head']}")
    if summary.get("from_scratch"):
        words.append("from scratch")
    elif n_layer and summary.get("n_transfer", n_layer) != n_layer:
        words.append(f"{summary['n_transfer']} of {n_layer} blocks")
    if paper_recipe and summary.get("lm_coef") == 0:
        words.append("no auxiliary LM")
    if summary.get("limit_train"):
        words.append(f"{summary['limit_train']:g} examples")
    return ", ".join(words) or "full"


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """The table of ``runs``: tasks in the order in which they come, one line for each split, variant and metric."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((run.task, run.variant, run.settings), []).append(run)
    lines = []
    for (task, variant, settings), group in groups.items():
        others = [other for *key, other in groups if key == [task, variant]]
        name = _told_apart(variant, settings, others)
        for split, metrics in _splits(group[0]).items():
            for metric in metrics:
                values = [_splits(run)[split][metric] for run in group if split in _splits(run)]
                constant = group[0].constant.get(split, {}).get(metric)
                first = metric == next(iter(metrics))
                lines.append(
                    Line(
                        task,
                        split,
                        name,
                        metric,
                        tuple(sorted(shown(metric, value) for value in values)),
                        None if constant is None else shown(metric, constant),
                        published(task, split, variant) if first else None,
                        group[0].train_examples,
                    )
                )
    return [*lines, *_glue_averages(lines)]


def _told_apart(variant: str, settings: tuple, others: list[tuple]) -> str:
    """``variant`` and those of the ``settings`` in which the runs of it differ."""
    rate, epochs = (len(set(values)) > 1 for values in zip(*others, strict=True))
    return variant + f", lr {settings[0]:g}" * rate + f", {settings[1]} epochs" * epochs


def _splits(run: Run) -> dict[str, dict[str, float]]:
    """The metrics of a run's splits; RACE's two levels also together, each question counted once."""
    if run.task != "race" or not {"high", "middle"} <= set(run.metrics) & set(run.examples):
        return run.metrics
    weights = {level: run.examples[level] for level in ("high", "middle")}
    right = sum(n * run.metrics[level]["accuracy"] for level, n in weights.items())
    return {**run.metrics, "all": {"accuracy": right / sum(weights.values())}}


def _glue_averages(lines: list[Line]) -> list[Line]:
    """The average over GLUE's tasks for each variant that has all of them; MNLI's two splits count as one task."""
    averages = []
    for variant in dict.fromkeys(line.variant for line in lines):
        means = {}
        for task in GLUE_TASKS:
            of_task = [line for line in lines if (line.task, line.variant) == (task, variant)]
            firsts = [line.median for line in of_task if of_task and line.metric == of_task[0].metric]
            if firsts:
                means[task] = statistics.mean(firsts)
        if len(means) == len(GLUE_TASKS):
            value = statistics.mean(means.values())
            averages.append(Line("glue", "dev", variant, "average", (value,), None, published("glue", "", variant), 0))
    return averages


def shown(metric: str, value: float) -> float:
    """A score in percent, an error as it is."""
    return value if metric in METRICS and METRICS[metric].lower_is_better else 100 * value


def to_markdown(lines: Sequence[Line]) -> str:
    """The table for people."""
    head = ("task", "split", "variant", "examples", "metric", "median", "range", "seeds", "constant", "published")
    rows = [head, ("---", "---", "---", "---:", "---", "---:", "---:", "---:", "---:", "---:")]
    for line in lines:
        spread = f"{line.values[0]:.2f}-{line.values[-1]:.2f}" if len(line.values) > 1 else ""
        n = f"{line.train_examples:,}" if line.train_examples else ""
        rows.append(
            (line.task, line.split, line.variant, n, line.metric, f"{line.median:.2f}", spread, str(len(line.values)),
             _cell(line.constant), _cell(line.published, 1))
        )  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def to_csv(lines: Sequence[Line]) -> str:
    """The table for programs, every seed's value in a cell of its own."""
    out = io.StringIO()
    n = max(len(line.values) for line in lines)
    writer = csv.writer(out, lineterminator="\n")
    names = ("task", "split", "variant", "train_examples", "metric", "median", "constant", "paper")
    writer.writerow([*names, *(f"value_{i + 1}" for i in range(n))])
    for line in lines:
        known = (line.task, line.split, line.variant, line.train_examples, line.metric)
        numbers = (line.median, line.constant, line.published, *line.values)
        writer.writerow([*known, *("" if value is None else f"{value:.4f}" for value in numbers)])
    return out.getvalue()
