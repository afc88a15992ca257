"""From the scores of options to figures: accuracy, Matthews correlation, what a constant answer gets."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from megagpt.errors import ConfigError, NumericError, nearest
from megagpt.zeroshot.heuristics import HEURISTICS
from megagpt.zeroshot.tasks import Asked


def measure(asked: Asked, scores: Sequence[Sequence[float]], references: Mapping[str, float]) -> dict:
    """The figures of a task from its options' ``scores``, training questions first.

    ``{metric, score, accuracy, constant, random, n}`` with percentages, 100 x the correlation where that is the metric;
    ``constant`` is what the best constant answer gets; ``normalised`` is (score - random) / (reference - random) where
    there is a reference, and ``threshold`` what a sentence's score must reach. Raises NumericError where a score is
    not finite.
    """
    if not all(math.isfinite(x) for options in scores for x in options):
        raise NumericError(f"a log-probability of task {asked.name} is not finite; the model's numbers are broken")
    labels = np.array([question.label for question in asked.questions])
    n_training, found = len(asked.training), {"metric": asked.heuristic.metric}
    if asked.heuristic.metric == "matthews":
        values = np.array([options[0] for options in scores])
        truth = np.array([question.label for question in asked.training])
        found["threshold"] = best_threshold(values[:n_training], truth)
        answers = (values[n_training:] >= found["threshold"]).astype(int)
    else:
        answers = np.array([int(np.argmax(options)) for options in scores[n_training:]])
    found["accuracy"] = 100 * float((answers == labels).mean())
    matthews = found["metric"] == "matthews"
    found["score"] = 100 * correlation(answers, labels) if matthews else found["accuracy"]
    found["constant_accuracy"] = 100 * max(Counter(labels.tolist()).values()) / len(labels)
    found["constant"] = 0.0 if matthews else found["constant_accuracy"]
    found["random"] = guessing(asked)
    reference = references.get(asked.name, asked.heuristic.reference)
    if reference is not None and reference != found["random"]:
        found["reference"] = reference
        found["normalised"] = (found["score"] - found["random"]) / (reference - found["random"])
    return found | {"n": len(labels)}


def guessing(asked: Asked) -> float:
    """What an answer drawn at random gets, in per cent."""
    if asked.heuristic.random is not None:
        return asked.heuristic.random
    return 100 * math.fsum(1 / len(q.options) for q in asked.questions) / len(asked.questions)


def correlation(answers: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' of two arrays of 0 and 1; 0 where one of them does not vary."""
    return float(_matthews(answers @ labels, answers.sum(), labels.sum(), len(labels)))


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold from which on 1 is answered that has the highest Matthews correlation; the lowest of several.

    It lies in the middle between two scores, so that rounding does not decide, or at the lowest score.
    """
    order = np.argsort(scores, kind="stable")
    ranked, truth = scores[order], labels[order]
    n, positive = len(labels), int(labels.sum())
    below = np.concatenate([[0], np.cumsum(truth)[:-1]])  # positives among the k lowest, k from 0 to n - 1
    starts = np.concatenate([[True], ranked[1:] > ranked[:-1]])  # equal scores are not parted
    values = np.where(starts, _matthews(positive - below, n - np.arange(n), positive, n), -2.0)
    k = int(values.argmax())
    return float(ranked[0] if k == 0 else (ranked[k - 1] + ranked[k]) / 2)


def _matthews(both, answered, positive, n):
    """From the numbers of answers 1 that are right, of answers 1, of labels 1 and of all; 0 where it is not defined."""
    both, answered = np.asarray(both, dtype=np.float64), np.asarray(answered, dtype=np.float64)
    spread = answered * (n - answered) * float(positive) * (n - float(positive))
    return np.where(spread > 0, (n * both - answered * positive) / np.sqrt(np.maximum(spread, 1.0)), 0.0)


def parse_references(words: Sequence[str]) -> dict[str, float]:
    """{task: per cent} of TASK=PERCENT. Raises ConfigError."""
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ConfigError(f"--references {word[:80]!r} is not TASK=PERCENT, as in winograd=70.1")
        if name not in HEURISTICS:
            raise ConfigError(f"--references names the unknown task {name[:80]!r}{nearest(name[:80], HEURISTICS)}")
        found[name] = value
    return found


HEADER = ["task", "metric", "score", "constant", "random", "reference", "normalised", "questions"]


def table_row(name: str, found: Mapping) -> list[str]:
    """The cells of a task's figures under ``HEADER``."""
    numbers = [f"{found[key]:.2f}" if key in found else "" for key in HEADER[2:6]]
    normalised = f"{found['normalised']:.3f}" if "normalised" in found else ""
    return [name, found["metric"], *numbers, normalised, f"{found['n']:,}"]
