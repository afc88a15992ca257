"""Scores: values worked out by hand, degenerate inputs, constant answers."""

import math

import numpy as np
import pytest

from megagpt.errors import NumericError
from megagpt.finetune.examples import Example, Split, TaskData
from megagpt.finetune.score import METRICS, better, constant_baselines, default_metrics, score

pytest.importorskip("sklearn")
pytest.importorskip("scipy")


def probabilities(classes, k):
    return np.eye(k)[list(classes)]


def test_scores_of_two_classes():
    # true positives 2, false positives 1, false negatives 1, true negatives 3
    outputs, targets = probabilities([1, 1, 1, 0, 0, 0, 0], 2), [1, 1, 0, 1, 0, 0, 0]
    values = score(("accuracy", "f1", "matthews"), "classify", outputs, targets)
    assert values["accuracy"] == pytest.approx(5 / 7)
    assert values["f1"] == pytest.approx(2 / 3)
    assert values["matthews"] == pytest.approx((2 * 3 - 1 * 1) / math.sqrt(3 * 3 * 4 * 4))


def test_scores_of_several_labels():
    outputs = np.array([[0.9, 0.2, 0.5], [0.1, 0.7, 0.4]])
    values = score(("micro_f1", "macro_f1"), "multilabel", outputs, [(0,), (1, 2)])
    # labels 0, 1: perfect; label 2: one false positive, one false negative. All: 2 right of 3 predicted and 3 true.
    assert values == pytest.approx({"micro_f1": 2 / 3, "macro_f1": 2 / 3})


def test_scores_of_numbers():
    outputs, targets = np.array([1.0, 2.0, 10.0]), [2.0, 4.0, 6.0]
    values = score(("pearson", "spearman", "rmse"), "regress", outputs, targets)
    assert values["spearman"] == pytest.approx(1.0)
    assert values["pearson"] == pytest.approx(18 / math.sqrt(146 / 3 * 8))
    assert values["rmse"] == pytest.approx(math.sqrt((1 + 4 + 16) / 3))
    assert score(["pearson"], "similar", outputs, targets, ordinal=True)["pearson"] == values["pearson"]


def test_choices_that_an_example_does_not_have_are_never_chosen():
    outputs = np.array([[0.4, 0.6, 0.0], [0.2, 0.3, 0.5]])
    assert score(["accuracy"], "choose", outputs, [1, 0]) == {"accuracy": 0.5}


def test_degenerate_inputs_score_zero():
    same = probabilities([0, 0, 0], 2)
    assert score(("matthews", "f1"), "classify", same, [0, 1, 1]) == {"matthews": 0.0, "f1": 0.0}
    assert score(("matthews", "f1"), "classify", same, [0, 0, 0]) == {"matthews": 0.0, "f1": 0.0}
    for outputs, targets in (([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0]), ([1.0], [1.0])):
        assert score(("pearson", "spearman"), "regress", outputs, targets) == {"pearson": 0.0, "spearman": 0.0}
    assert score(("micro_f1", "macro_f1"), "multilabel", np.zeros((2, 3)), [(), (1,)]) == {
        "micro_f1": 0.0,
        "macro_f1": 0.0,
    }


def test_outputs_that_are_not_finite_have_no_score():
    with pytest.raises(NumericError, match="1 of the model's outputs are not finite"):
        score(["accuracy"], "classify", [[0.5, np.nan]], [0])


def test_only_errors_are_better_when_smaller():
    assert better("accuracy", 0.1, None)
    assert better("accuracy", 0.2, 0.1)
    assert not better("accuracy", 0.1, 0.1)
    assert better("rmse", 0.1, 0.2)
    assert [name for name, metric in METRICS.items() if metric.lower_is_better] == ["rmse"]


@pytest.mark.parametrize("kind", ["classify", "entail", "similar", "choose", "multilabel", "regress"])
@pytest.mark.parametrize("n_labels", [2, 5])
def test_every_kind_has_metrics_by_default(kind, n_labels):
    from megagpt.finetune.score import check_metrics

    check_metrics(default_metrics(kind, n_labels), kind, n_labels)


def task(metrics, train, valid, kind="classify", labels=("0", "1"), **rest):
    def split(name, found):
        return Split(name, tuple(Example(str(i), ("t",), label=label) for i, label in enumerate(found)))

    return TaskData("x", kind, labels, metrics, split("train", train), {"dev": split("dev", valid)}, **rest)


def dev(zeros, ones):
    return [0] * zeros + [1] * ones


@pytest.mark.parametrize(
    ("metrics", "train", "valid", "expected"),
    [
        # sizes of the public files (train: which class is the larger one); the values are well known
        (("accuracy", "matthews"), [0, 1, 1], dev(322, 721), (69.13, 0.0)),  # CoLA dev
        (("accuracy",), [0, 1, 1], dev(428, 444), (50.92,)),  # SST-2 dev
        (("f1", "accuracy"), [0, 1, 1], dev(129, 279), (81.22, 68.38)),  # MRPC dev
        (("f1",), [0, 1, 1], dev(578, 1147), (79.87,)),  # MRPC test
        (("accuracy",), [0, 0, 1], dev(146, 131), (52.71,)),  # RTE dev
        (("accuracy",), [0, 1, 1], dev(2702, 2761), (50.54,)),  # QNLI dev
        (("f1", "accuracy"), [0, 0, 1], dev(3, 1), (40.0, 75.0)),  # each metric has its own best constant
    ],
)
def test_constant_answers_score_what_is_known_of_the_public_sets(metrics, train, valid, expected):
    found = constant_baselines(task(metrics, train, valid))["dev"]
    assert [round(100 * found[name], 2) for name in metrics] == list(expected)


def test_constant_answers_of_the_other_kinds():
    numbers = task(("pearson", "rmse"), [1.0, 2.0, 9.0], [4.0, 0.0], kind="regress", labels=())
    assert constant_baselines(numbers)["dev"] == pytest.approx({"pearson": 0.0, "rmse": math.sqrt(8)})  # the mean, 4
    several = task(("micro_f1",), [(0,), (0, 1), (0,)], [(0,), (0, 2)], kind="multilabel", labels=("a", "b", "c"))
    assert constant_baselines(several)["dev"] == pytest.approx({"micro_f1": 4 / 5})  # always the first label
