"""Metrics of predictions, by scikit-learn and SciPy, and what a constant answer scores.

``outputs`` are float64 arrays: probabilities (N, K) for classify, entail, similar and multilabel, and for choose, where
they are padded with zeros to the largest number of choices; predicted values (N,) for regress and ordered classes.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megagpt.errors import ConfigError, NumericError, nearest
from megagpt.finetune.examples import Split, TaskData

THRESHOLD = 0.5  # a label is predicted from this probability on

_CLASSES = ("classify", "entail", "similar")


@dataclass(frozen=True)
class Metric:
    """``of(predictions, targets)``: class indices (N,), indicators (N, K) or numbers (N,), both of one form."""

    of: Callable[[np.ndarray, np.ndarray], float]
    kinds: tuple[str, ...]
    numbers: bool = False  # of numbers: regress, and similar with ordered classes
    binary: bool = False  # needs exactly two classes, the second one positive
    lower_is_better: bool = False


def score(
    metrics: Sequence[str], kind: str, outputs: np.ndarray, targets: Sequence, *, ordinal: bool = False
) -> dict[str, float]:
    """Each metric's value, percentages as fractions of 1.

    ``targets`` are the examples' labels: indices, tuples of indices for multilabel, numbers for regress and ordered
    classes. Raises NumericError where an output is not finite.
    """
    outputs = np.asarray(outputs, dtype=np.float64)
    if len(outputs) != len(targets) or not len(targets):
        raise AssertionError(f"{len(outputs)} outputs for {len(targets)} targets")
    if not np.isfinite(outputs).all():
        raise NumericError(f"{int((~np.isfinite(outputs)).sum())} of the model's outputs are not finite")
    predictions = predict(kind, outputs, ordinal=ordinal)
    truth = _truth(kind, targets, outputs.shape[-1], ordinal)
    return {name: float(METRICS[name].of(predictions, truth)) for name in metrics}


def predict(kind: str, outputs: np.ndarray, *, ordinal: bool = False) -> np.ndarray:
    """What the model answers: indices (N,), indicators (N, K) for multilabel, numbers (N,) as they are."""
    if kind == "regress" or ordinal:
        return outputs
    return (outputs >= THRESHOLD).astype(np.int64) if kind == "multilabel" else outputs.argmax(-1)


def better(metric: str, value: float, than: float | None) -> bool:
    """Whether ``value`` of ``metric`` is better than another one, or than none."""
    if than is None:
        return True
    return value < than if METRICS[metric].lower_is_better else value > than


def check_metrics(metrics: Sequence[str], kind: str, n_labels: int, *, ordinal: bool = False) -> None:
    """Raise ConfigError for a metric that is unknown or says nothing about this kind of task."""
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"metric {name!r} is unknown{nearest(name, METRICS)}; choose among {', '.join(METRICS)}")
        metric = METRICS[name]
        if kind not in metric.kinds or metric.numbers != (ordinal or kind == "regress"):
            fitting = ", ".join(_fitting(kind, n_labels, ordinal))
            raise ConfigError(f"metric {name} is not for kind {kind}; choose among {fitting}")
        if metric.binary and n_labels != 2:
            raise ConfigError(f"metric {name} is for two classes and there are {n_labels}; choose macro_f1 or micro_f1")


def _fitting(kind: str, n_labels: int, ordinal: bool) -> list[str]:
    numbers = ordinal or kind == "regress"
    return [
        name for name, m in METRICS.items()
        if kind in m.kinds and m.numbers == numbers and (n_labels == 2 or not m.binary)
    ]  # fmt: skip


def default_metrics(kind: str, n_labels: int) -> tuple[str, ...]:
    """What is computed where nothing was asked for; the first one decides which checkpoint is best."""
    if kind in _CLASSES:
        return ("accuracy", "f1", "matthews") if n_labels == 2 else ("accuracy", "macro_f1")
    return {"choose": ("accuracy",), "multilabel": ("micro_f1", "macro_f1")}.get(kind, ("pearson", "spearman", "rmse"))


def constant_baselines(data: TaskData) -> dict[str, dict[str, float]]:
    """For every split with labels but train, each metric's value of the constant answer that is best on train."""
    splits = [s for s in (*data.valid.values(), *data.test.values()) if s.examples[0].label is not None]
    best = {name: _best_constant(data, name) for name in data.metrics}
    return {s.name: {name: _score_constant(data, name, answer, s) for name, answer in best.items()} for s in splits}


def _best_constant(data: TaskData, metric: str) -> np.ndarray:
    values = [(_score_constant(data, metric, answer, data.train), answer) for answer in _constants(data)]
    sign = -1.0 if METRICS[metric].lower_is_better else 1.0
    return max(values, key=lambda pair: sign * pair[0])[1]


def _constants(data: TaskData) -> list[np.ndarray]:
    """The constant answers there are, each as the model's output for one example."""
    labels = [e.label for e in data.train.examples]
    if data.kind == "regress" or data.ordinal:
        return [np.array(np.mean(labels)), np.array(np.median(labels))]
    if data.kind != "multilabel":
        return list(np.eye(_width(data)))
    counts = np.bincount([i for label in labels for i in label], minlength=len(data.labels))
    ranks = np.argsort(np.argsort(-counts, kind="stable"))
    return [(ranks < k).astype(np.float64) for k in range(len(counts) + 1)]  # none, the most frequent one, two, ...


def _width(data: TaskData) -> int:
    return len(data.labels) or max(len(e.choices) for s in data.splits() for e in s.examples)


def _score_constant(data: TaskData, metric: str, answer: np.ndarray, split: Split) -> float:
    outputs = np.repeat(answer[None], len(split), axis=0)
    return score([metric], data.kind, outputs, [e.label for e in split.examples], ordinal=data.ordinal)[metric]


def _truth(kind: str, targets: Sequence, width: int, ordinal: bool) -> np.ndarray:
    if kind == "multilabel":
        truth = np.zeros((len(targets), width), dtype=np.int64)
        for row, indices in zip(truth, targets, strict=True):
            row[list(indices)] = 1
        return truth
    return np.asarray(targets, dtype=np.float64 if kind == "regress" or ordinal else np.int64)


def _sklearn():
    try:
        import sklearn.metrics
    except ImportError:
        raise ConfigError("scores need scikit-learn and SciPy: pip install 'megagpt[finetune]'") from None
    return sklearn.metrics


def _accuracy(predictions: np.ndarray, targets: np.ndarray) -> float:
    return _sklearn().accuracy_score(targets, predictions)


def _matthews(predictions: np.ndarray, targets: np.ndarray) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one class in both: the value is 0 by definition
        return _sklearn().matthews_corrcoef(targets, predictions)


def _f1(average: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def of(predictions: np.ndarray, targets: np.ndarray) -> float:
        return _sklearn().f1_score(targets, predictions, average=average, zero_division=0.0)

    return of


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """0 where a side is constant, or there is one example: the correlation is not defined then."""

    def of(predictions: np.ndarray, targets: np.ndarray) -> float:
        _sklearn()  # for one message about both packages
        import scipy.stats

        if len(targets) < 2 or np.ptp(predictions) == 0 or np.ptp(targets) == 0:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.NearConstantInputWarning)
            value = getattr(scipy.stats, name)(predictions, targets).statistic
        return float(value) if math.isfinite(value) else 0.0

    return of


def _rmse(predictions: np.ndarray, targets: np.ndarray) -> float:
    return math.sqrt(_sklearn().mean_squared_error(targets, predictions))


_NUMBERS = {"kinds": ("regress", "similar"), "numbers": True}
METRICS = {
    "accuracy": Metric(_accuracy, (*_CLASSES, "choose")),
    "f1": Metric(_f1("binary"), _CLASSES, binary=True),
    "matthews": Metric(_matthews, _CLASSES),
    "micro_f1": Metric(_f1("micro"), (*_CLASSES, "multilabel")),
    "macro_f1": Metric(_f1("macro"), (*_CLASSES, "multilabel")),
    "pearson": Metric(_correlation("pearsonr"), **_NUMBERS),
    "spearman": Metric(_correlation("spearmanr"), **_NUMBERS),
    "rmse": Metric(_rmse, **_NUMBERS, lower_is_better=True),
}
