"""What a fine-tuning run says and leaves to read: its lines, predictions and summary."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megagpt.data.storage import replace
from megagpt.errors import StorageError
from megagpt.finetune.examples import Example
from megagpt.finetune.plan import FinetunePlan
from megagpt.finetune.score import constant_baselines, predict
from megagpt.finetune.spec import TaskSpec
from megagpt.train.checkpoint import TrainState

FOLDER = "predictions"


def opening_lines(plan: FinetunePlan, ops, step: int) -> list[str]:
    """What a run says at its start."""
    data, config = plan.data, plan.config
    sizes = ", ".join(f"{split.name} {len(split):,}" for split in data.splits())
    ranks = f"{config.world_size} rank{'s' * (config.world_size > 1)}"
    taken = "nothing" if plan.n_transfer < 0 else f"embeddings and {plan.n_transfer} blocks"
    return [
        f"task {data.task}: {data.kind}, {sizes} examples; best by {data.metrics[0]}",
        *(
            f"WARNING: {split.name}: {split.n_skipped:,} row{'s' * (split.n_skipped > 1)} skipped: "
            f"{'; '.join(split.skipped)}{'; ...' if split.n_skipped > len(split.skipped) else ''}"
            for split in data.splits()
            if split.n_skipped
        ),
        *(
            f"WARNING: {name}: {encoded.n_cut:,} of {len(encoded):,} examples are longer than the model reads "
            f"({plan.settings.document_tokens or plan.model.seq_len} tokens) and are cut"
            for name, encoded in plan.splits.items()
            if encoded.n_cut
        ),
        f"model of {plan.settings.init_from}: {plan.model.n_params():,} parameters, {taken} pre-trained; head "
        f"{plan.spec.head}, recipe {plan.recipe.name}",
        f"kernels {ops.name}: {ops.reason}",
        f"ZeRO stage {config.zero_stage}, {config.precision}, {ranks}, batch {config.micro_batch} x "
        f"{config.accumulation} x {config.world_size} = {config.global_batch} examples",
        f"run folder {plan.run_dir}, step {step} of {plan.total_steps}",
    ]


def summary(plan: FinetunePlan, state: TrainState, found: dict[str, dict], seconds: float) -> dict:
    """The part of summary.json that is about the task."""
    settings = plan.settings
    phase = next((p for p in plan.phases if state.best_step and state.best_step <= p.end), plan.phases[-1])
    earlier = sum(p.phase.epochs for p in plan.phases[: phase.index] if p.phase.objective == "task")
    best = ((state.best_step or state.step) - phase.first) // phase.steps_per_epoch
    return {
        "model": f"of {settings.init_from}",
        "n_params": plan.model.n_params(),
        "task": plan.data.task,
        "kind": plan.data.kind,
        "recipe": plan.recipe.name,
        "head": plan.spec.head,
        "seed": settings.seed,
        "best_step": state.best_step,
        "best_epoch": earlier + best,
        "metrics": found,
        "constant": constant_baselines(plan.data),
        "examples": {split.name: len(split) for split in plan.data.splits()},
        "train_examples": len(plan.data.train),
        "n_transfer": plan.n_transfer,
        "n_layer": plan.model.n_layer,
        "backbone": plan.model.backbone,
        "lm_coef": max(p.phase.lm_coef for p in plan.phases),
        "lr": plan.phases[-1].phase.lr,
        "epochs": sum(p.phase.epochs for p in plan.phases if p.phase.objective == "task"),
        "from_scratch": settings.from_scratch,
        "limit_train": settings.limit_train,
        "last_start_wall_seconds": seconds,
    }


def closing_lines(summary: dict) -> list[str]:
    """Metrics beside those of a constant answer, a line for each split."""
    lines = []
    for split, measures in summary["metrics"].items():
        constant = summary["constant"].get(split, {})
        shown = [
            f"{name} {value:.4f}" + (f" (constant answer {constant[name]:.4f})" if name in constant else "")
            for name, value in measures.items()
        ]
        if shown:
            lines.append(f"best of epoch {summary['best_epoch']}, {split}: {', '.join(shown)}")
    return lines


def table(examples: Sequence[Example], outputs: np.ndarray, spec: TaskSpec) -> str:
    """Tab-separated lines with a header: id, label and, but for numbers, the probability of every label or choice."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
    numbers = spec.kind == "regress" or spec.ordinal
    names = [] if numbers else [*(spec.labels or map(str, range(outputs.shape[1])))]
    writer.writerow(["id", "label", *names])
    answers = predict(spec.kind, outputs, ordinal=spec.ordinal)
    for example, answer, row in zip(examples, answers, outputs, strict=True):
        shown = [] if numbers else [f"{p:.6g}" for p in row]
        writer.writerow([example.id, label_of(answer, spec), *shown])
    return file.getvalue()


def label_of(answer, spec: TaskSpec) -> str:
    """An answer as text: a label's name, several joined by ``|``, a choice's index, or a number."""
    if spec.kind == "regress" or spec.ordinal:
        return f"{answer:.6g}"
    if spec.kind == "multilabel":
        return "|".join(name for name, is_there in zip(spec.labels, answer, strict=True) if is_there)
    return spec.labels[answer] if spec.labels else str(int(answer))


def write_predictions(
    run_dir: Path, split: str, examples: Sequence[Example], outputs: np.ndarray, spec: TaskSpec
) -> None:
    """Write predictions/<split>.tsv. Raises StorageError."""
    write(run_dir / FOLDER / f"{split}.tsv", table(examples, outputs, spec), "another --run_dir")


def write(path: Path, text: str, instead: str) -> None:
    """Write a whole file or none. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; free space or choose {instead}") from None
