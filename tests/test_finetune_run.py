"""``finetune.py`` from files to predictions, on every ZeRO stage and any number of ranks."""

import csv
import functools
import json
import tempfile
from pathlib import Path

import pytest
from distributed import finetune
from finetune_common import ds_config, folder, pretrained, write_csv

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


def run(home: Path, stage: int, ranks: int, *more) -> list[dict]:
    codes, output = finetune(arguments(home, stage, *more), ranks)
    assert codes == [0] * ranks, output
    return curve(home / "run")


def assert_same_curve(found: list[dict], expected: list[dict], tolerance: float) -> None:
    assert [r["step"] for r in found] == [r["step"] for r in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, abs=tolerance, rel=tolerance), (ours["step"], key)


@functools.cache
def reference() -> tuple[Path, list[dict]]:
    home = Path(tempfile.mkdtemp(dir=folder()))
    return home, run(home, 0, 1)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_every_zero_stage_and_number_of_ranks_gives_the_same_curve(tmp_path, stage, ranks):
    _, expected = reference()
    assert_same_curve(run(tmp_path, stage, ranks), expected, 1e-4)


def test_a_run_leaves_the_best_model_its_predictions_and_what_they_are_of():
    home, records = reference()
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


def test_predict_repeats_the_predictions_of_the_run(tmp_path):
    home, _ = reference()
    assert (
        megagpt(
            [
                "predict",
                "--from",
                str(home / "run"),
                "--input",
                str(folder() / "dev.csv"),
                "--output",
                f"{tmp_path}/o.tsv",
            ]
        )
        == 0
    )
    assert (tmp_path / "o.tsv").read_text() == (home / "run" / "predictions" / "valid.tsv").read_text()
