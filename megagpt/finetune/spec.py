"""What a fine-tuned model answers: enough, beside its weights and tokenizer, to use it without the task's files."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from megagpt.finetune.examples import KINDS, Example, TaskData
from megagpt.finetune.heads import HEADS


@dataclass(frozen=True)
class TaskSpec:
    """The task and the head of a model. ``shift`` and ``scale``: a number is predicted as (number - shift) / scale."""

    task: str
    kind: str
    labels: tuple[str, ...]
    n_outputs: int
    head: str
    head_dropout: float
    ordinal: bool = False
    parents: tuple[int | None, ...] = ()
    shift: float = 0.0
    scale: float = 1.0
    text_columns: tuple[str, ...] = ()
    choice_columns: tuple[str, ...] = ()
    clean: str = "none"
    context: int | None = None  # longest sequence; None: the model's
    document_tokens: int | None = None

    @classmethod
    def of(cls, data: TaskData, **head_and_texts) -> "TaskSpec":
        """The spec of a task; a task of numbers is standardised by its training examples."""
        shift, scale = 0.0, 1.0
        if data.kind == "regress":
            numbers = np.array([e.label for e in data.train.examples], dtype=np.float64)
            shift, scale = float(numbers.mean()), float(numbers.std()) or 1.0
        return cls(
            task=data.task,
            kind=data.kind,
            labels=data.labels,
            n_outputs=data.n_outputs,
            ordinal=data.ordinal,
            parents=data.parents,
            shift=shift,
            scale=scale,
            text_columns=data.text_columns,
            choice_columns=data.choice_columns,
            **head_and_texts,
        )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "TaskSpec":
        """The inverse of :meth:`to_dict`, also after JSON.

        Raises ValueError or TypeError for values that no spec has.
        """
        spec = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        wrong = [name for name, fits in _FITS.items() if not fits(getattr(spec, name))]
        if wrong:
            raise ValueError(f"{wrong[0]} is {str(getattr(spec, wrong[0]))[:80]!r}")
        return spec

    def targets(self, examples: Sequence[Example]) -> np.ndarray | None:
        """What the loss compares with, or None where an example has no label.

        int64 (N,) class indices; float32 (N, K) of several or soft labels; float32 (N,) of standardised numbers.
        """
        labels = [e.label for e in examples]
        if any(label is None for label in labels):
            return None
        if self.kind == "regress":
            return ((np.array(labels, dtype=np.float64) - self.shift) / self.scale).astype(np.float32)
        if self.kind == "multilabel":
            table = np.zeros((len(labels), self.n_outputs), dtype=np.float32)
            for row, indices in zip(table, labels, strict=True):
                row[list(indices)] = 1.0
            return table
        if self.ordinal:
            return soft_classes(np.array(labels, dtype=np.float64), self.n_outputs)
        return np.array(labels, dtype=np.int64)


def _texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _length(value: object) -> bool:
    return value is None or (type(value) is int and value >= 1)


_MOST_OUTPUTS = 1_000_000
_FITS = {  # what each field of a spec from a file may hold
    "task": lambda value: isinstance(value, str),
    "kind": lambda value: isinstance(value, str) and value in KINDS,
    "labels": _texts,
    "n_outputs": lambda value: type(value) is int and 1 <= value <= _MOST_OUTPUTS,
    "head": lambda value: isinstance(value, str) and value in HEADS,
    "head_dropout": lambda value: _finite(value) and 0 <= value < 1,
    "ordinal": lambda value: isinstance(value, bool),
    "parents": lambda value: isinstance(value, tuple) and all(p is None or type(p) is int for p in value),
    "shift": _finite,
    "scale": lambda value: _finite(value) and value != 0,
    "text_columns": _texts,
    "choice_columns": _texts,
    "clean": lambda value: isinstance(value, str),
    "context": _length,
    "document_tokens": _length,
}


def soft_classes(values: np.ndarray, K: int) -> np.ndarray:
    """float32 (N, K): each value shared between the whole numbers beside it, so that sum_i i p_i is the value."""
    low = np.clip(np.floor(values).astype(np.int64), 0, K - 1)
    high = np.minimum(low + 1, K - 1)
    part = values - low
    table = np.zeros((len(values), K))
    np.add.at(table, (np.arange(len(values)), low), 1.0 - part)
    np.add.at(table, (np.arange(len(values)), high), part)
    return table.astype(np.float32)
