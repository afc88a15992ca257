"""The figures of zero-shot tasks: thresholds, correlations, normalised scores, and a trajectory's table and picture."""

import csv
import math

import numpy as np
import pytest

from megagpt.errors import NumericError
from megagpt.zeroshot.heuristics import HEURISTICS, Question
from megagpt.zeroshot.results import best_threshold, correlation, measure
from megagpt.zeroshot.tasks import Asked
from megagpt.zeroshot.trajectory import curves, write_trajectory


def asked(name, *questions, training=()):
    return Asked(name, HEURISTICS[name], "partial", list(questions), list(training))


@pytest.mark.parametrize("seed", range(4))
def test_the_threshold_is_the_best_one_there_is(seed):
    from sklearn.metrics import matthews_corrcoef

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 40)
    scores = np.round(rng.normal(size=40) + 0.7 * labels, 1)  # with equal ones
    threshold = best_threshold(scores, labels)
    found = correlation((scores >= threshold).astype(int), labels)
    assert found == pytest.approx(matthews_corrcoef(labels, scores >= threshold))
    assert found == pytest.approx(max(matthews_corrcoef(labels, scores >= t) for t in scores))


def test_figures_of_a_task_by_hand():
    def question(label):
        return Question("", ("",), ("x",), label)

    task = asked("cola", *map(question, [1, 1, 0, 1]), training=list(map(question, [0, 1])))
    found = measure(task, [[-4.0], [-2.0], [-1.0], [-3.5], [-3.1], [-2.0]], {})
    assert found["threshold"] == -3.0
    assert found["accuracy"] == 75.0  # 1, 0, 0, 1 against 1, 1, 0, 1
    assert found["score"] == pytest.approx(100 * (4 * 2 - 2 * 3) / math.sqrt(2 * 2 * 3 * 1))
    assert found["normalised"] == pytest.approx(found["score"] / 35)
    assert (found["constant_accuracy"], found["constant"], found["n"]) == (75.0, 0.0, 4)


def test_a_score_is_normalised_between_guessing_and_the_reference():
    questions = [Question(str(i), ("", ""), ("x", "y"), 0) for i in range(4)]
    scores = [[1.0, 0.0]] * 3 + [[0.0, 1.0]]
    assert measure(asked("sst2", *questions), scores, {})["normalised"] == pytest.approx(25 / 43.2)
    assert "normalised" not in measure(asked("winograd", *questions), scores, {})
    assert measure(asked("winograd", *questions), scores, {"winograd": 100.0})["normalised"] == 0.5
    with pytest.raises(NumericError, match="winograd is not finite"):
        measure(asked("winograd", *questions), [[math.nan, 0.0]] * 4, {})


def test_a_trajectory_is_a_table_and_a_picture(tmp_path):
    def figures(score):
        return {"metric": "accuracy", "score": score, "random": 50.0, "reference": 90.0,
                "normalised": (score - 50) / 40, "n": 10}  # fmt: skip

    without = {"metric": "accuracy", "score": 51.0, "random": 50.0, "n": 5}
    steps = [{"step": s, "tasks": {"sst2": figures(50 + s), "copa": without}} for s in (0, 1, 2, 4, 8)]
    said = write_trajectory(steps, tmp_path, "figures")
    rows = list(csv.DictReader((tmp_path / "figures.csv").open()))
    assert len(rows) == 10
    assert (rows[4]["step"], rows[4]["task"], rows[4]["score"], rows[4]["normalised"]) == ("2", "sst2", "52", "0.05")
    assert rows[5]["normalised"] == ""
    assert curves(steps) == {"sst2": ([1, 2, 4, 8], pytest.approx([0.025, 0.05, 0.1, 0.2]))}
    assert said[1] == f"picture: {tmp_path / 'figures.png'}"
    assert (tmp_path / "figures.png").read_bytes()[:4] == b"\x89PNG"
    assert "--references" in write_trajectory(steps[:1], tmp_path, "none")[1]
