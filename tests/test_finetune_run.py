"""``finetune.py`` from files to predictions, on every ZeRO stage and any number of ranks."""

import csv
import json
from pathlib import Path

import pytest
from distributed import run_ranks
from finetune_common import ds_config, folder, pretrained, train_all, write_csv

from megagpt.cli import main as megagpt

SETTINGS = ["--global_batch_size", 8, "--micro_batch_size", 2, "--lr", 1e-3, "--dropout", 0, "--head_dropout", 0]


def arguments(home: Path, stage: int = 0, *more) -> list:
    train, valid = write_csv(folder() / "my.csv", 44, 0), write_csv(folder() / "dev.csv", 21, 1)
    files = ["--train", train, "--valid", valid, "--text_column", "text", "--label_column", "label"]
    start = ["--init_from", pretrained(), "--run_dir", home / "run", "--log_interval", 1]
    return ["--ds_config", ds_config(home, stage), *files, *start, *SETTINGS, *more]


def curve(run_dir: Path) -> list[dict]:
    keep = ("step", "loss", "lr", "grad_norm", "tokens")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k in keep or k.startswith("valid/")} for r in records]


def assert_same_curve(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, abs=tolerance, rel=tolerance), (ours["step"], key)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders 0-1, 3-2 and so on with a run at each ZeRO stage on one rank and on two."""
    top = tmp_path_factory.mktemp("runs")
    for ranks in (1, 2):
        homes = [top / f"{stage}-{ranks}" for stage in range(4)]
        for home in homes:
            home.mkdir()
        run_ranks(train_all, ranks, [arguments(home, stage) for stage, home in enumerate(homes)], timeout=240)
    return top


@pytest.fixture
def home(runs) -> Path:
    """The folder of the run without ZeRO on one rank."""
    return runs / "0-1"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", range(4))
def test_every_zero_stage_and_number_of_ranks_gives_the_same_curve(runs, stage, ranks):
    assert_same_curve(curve(runs / f"{stage}-{ranks}" / "run"), curve(runs / "0-1" / "run"), 1e-4)
    first = curve(runs / "0-1" / "run")[0]["loss"]
    assert curve(runs / f"{stage}-{ranks}" / "run")[-2]["loss"] < first - 0.05  # something was learnt


def test_a_run_leaves_the_best_model_its_predictions_and_what_they_are_of(home):
    records = curve(home / "run")
    assert sum("loss" in r for r in records) == 3 * (44 // 8)  # the last, short batch of an epoch is dropped
    summary = json.loads((home / "run" / "summary.json").read_text())
    best = max(r["valid/valid/accuracy"] for r in records if "valid/valid/accuracy" in r)
    assert summary["metrics"]["valid"]["accuracy"] == best
    assert summary["examples"] == {"train": 44, "valid": 21}
    with open(home / "run" / "predictions" / "valid.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with open(folder() / "dev.csv", newline="") as file:
        truth = [row["label"] for row in csv.DictReader(file)]
    assert [row["id"] for row in rows] == [str(i) for i in range(21)]
    assert sum(r["label"] == t for r, t in zip(rows, truth, strict=True)) / 21 == pytest.approx(best)
    for row in rows:
        assert float(row["minus"]) + float(row["plus"]) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(("minus", "plus"), key=lambda name: float(row[name]))
    about = json.loads((home / "run" / "run.json").read_text())
    assert (about["task"], about["kind"], about["labels"], about["seed"]) == ("my", "classify", ["minus", "plus"], 1234)


def test_predict_repeats_the_predictions_of_the_run(home, tmp_path):
    files = ["--input", str(folder() / "dev.csv"), "--output", str(tmp_path / "out.tsv")]
    assert megagpt(["predict", "--from", str(home / "run"), *files]) == 0
    assert (tmp_path / "out.tsv").read_text() == (home / "run" / "predictions" / "valid.tsv").read_text()


WRONG_INPUTS = {
    "another column": ("txt,label\na b,plus\n", [], "text"),
    "an empty text": ('text\na b\n""\n', [], "new.csv:3"),
    "a row too wide": ("text,label\na b,plus\na,b,c\n", [], "new.csv:3"),
    "no rows": ("text\n", [], "new.csv"),
    "no file": (None, [], "new.csv"),
    "two texts": ("text,other\na,b\n", ["--text_column", "text,other"], "names 2 columns; kind classify has 1"),
    "no batch": ("text\na b\n", ["--batch_size", "0"], "--batch_size 0 must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_what_predict_cannot_answer_is_one_sentence_and_nothing_is_written(case, home, tmp_path, capsys):
    content, more, words = WRONG_INPUTS[case]
    if content is not None:
        (tmp_path / "new.csv").write_text(content)
    files = ["--input", str(tmp_path / "new.csv"), "--output", str(tmp_path / "out.tsv")]
    assert megagpt(["predict", "--from", str(home / "run"), *files, *more]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("error:") == 1
    assert not (tmp_path / "out.tsv").exists()
