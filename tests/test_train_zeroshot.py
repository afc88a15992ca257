"""``--zeroshot_interval``: tasks asked on the way of a run, as its checkpoints answer them afterwards."""

import csv
import json

import pytest
from checkpoint_common import arguments, curve
from distributed import train
from test_evaluate_generate import byte_tokenizer
from test_zeroshot import FILES

from megagpt.config import deepspeed
from megagpt.config.fields import parse
from megagpt.data.main import prepare_main
from megagpt.dist import resolve_world
from megagpt.errors import ConfigError
from megagpt.evaluate.measure import evaluate_main
from megagpt.train.intervals import due_doubling
from megagpt.train.plan import make_plan
from megagpt.zeroshot.main import kept_checkpoints, zeroshot_main

SHORT = ("cola/train.tsv", "cola/dev.tsv", "sst2/dev.tsv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus with a tokenizer of bytes, and the files of two tasks."""
    root = tmp_path_factory.mktemp("data")
    (root / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (root / "text.txt").write_text("It was a dark night. The wind and the rain did not rest.\n\n" * 60)
    made = ["--input", root / "text.txt", "--tokenizer", root / "tokenizer.json", "--output", root / "corpus"]
    assert prepare_main([str(word) for word in made]) == 0
    for name in SHORT:
        (root / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tasks" / name).write_text(FILES[name])
    return root


def flags(folder, run_dir, **changes):
    asked = {"zeroshot_interval": 1, "zeroshot_data": folder / "tasks", "seq_len": 48, "data": folder / "corpus"}
    return arguments(run_dir, **{"stage": 3, "max_steps": 5, **asked, **changes})


def given(words):
    """``words`` without the flags whose value is None."""
    pairs = [(words[i], words[i + 1]) for i in range(0, len(words), 2) if words[i + 1] is not None]
    return [str(word) for pair in pairs for word in pair]


def logged(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    asked = [r for r in records if "zeroshot/sst2/score" in r]
    return {r["step"]: {key: value for key, value in r.items() if key != "step"} for r in asked}


def test_a_run_under_zero_3_logs_what_its_checkpoints_answer_afterwards(folder, tmp_path, capsys):
    run = tmp_path / "run"
    codes, output = train(flags(folder, run, keep_last=2, keep_weights_interval=1), 2)
    assert codes == [0, 0], output
    found = logged(run)
    assert list(found) == [0, 1, 2, 4, 5]
    assert "zero-shot at iteration 4: cola" in output
    rows = list(csv.DictReader((run / "zeroshot.csv").open()))
    assert [(row["step"], row["task"]) for row in rows[:3]] == [("0", "cola"), ("0", "sst2"), ("1", "cola")]
    assert (run / "zeroshot.png").exists()
    assert len(list((run / "checkpoints").glob("global_step*"))) < 5  # of the others there are only weights
    words = ["--trajectory", run, "--task_data", folder / "tasks", "--json", tmp_path / "out.json"]
    assert zeroshot_main([*map(str, words), "--references", "sst2=93.2"]) == 0
    steps = json.loads((tmp_path / "out.json").read_text())["trajectory"]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5]
    for entry in steps:
        if entry["step"] in found:
            for task, figures in entry["tasks"].items():
                numbers = {f"zeroshot/{task}/{k}": v for k, v in figures.items() if k != "metric"}
                assert {k: found[entry["step"]][k] for k in numbers} == pytest.approx(numbers, abs=1e-4)
    assert (run / "trajectory.csv").exists()
    assert (run / "trajectory.png").exists()
    assert zeroshot_main([*map(str, ["--from", run, *words[2:]])]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["checkpoints"] == {str(run): "global_step5"}
    (tmp_path / "text.txt").write_text("It was a dark night. " * 9)
    assert evaluate_main([*map(str, ["--from", run, "--data", tmp_path / "text.txt", *words[4:]])]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["from"], found["checkpoint"], found["step"]) == (str(run), "global_step5", 5)
    assert capsys.readouterr().out.count(f"{run}: global_step5\n") == 2
    (run / "checkpoints" / "global_step5" / "manifest.json").unlink()
    found, notes = kept_checkpoints(run)
    assert found[-1] == str(run / "weights" / "global_step5")
    told = "skipped checkpoint global_step5: it has no manifest.json; the weights that were kept of it are asked"
    assert notes == [told]


def test_asking_changes_nothing_about_the_training(folder, tmp_path):
    curves = []
    for interval in (1, 0):
        asked = {} if interval else {"zeroshot_interval": 0, "zeroshot_data": None}
        words = flags(folder, tmp_path / str(interval), stage=0, dropout=0.1, **asked)
        codes, output = train(given(words), 1)
        assert codes == [0], output
        curves.append([r["loss"] for r in curve(tmp_path / str(interval)) if "loss" in r])
    assert len(curves[0]) == 5
    assert curves[0] == curves[1]


def test_tasks_are_asked_at_steps_that_double():
    assert [step for step in range(100) if due_doubling(step, 3)] == [3, 6, 12, 24, 48, 96]
    assert not any(due_doubling(step, 0) for step in range(10))


def planned(words):
    settings = parse(words)
    return make_plan(settings, deepspeed.load(settings.ds_config), resolve_world({}))


BAD = {
    "data": ({"zeroshot_data": None}, "--zeroshot_interval needs --zeroshot_data"),
    "interval": ({"zeroshot_interval": 0}, "--zeroshot_data needs --zeroshot_interval"),
    "limit": (
        {"zeroshot_interval": 0, "zeroshot_data": None, "zeroshot_tasks": None, "zeroshot_limit": 9},
        "--zeroshot_limit needs --zeroshot_interval",
    ),
    "task": ({"zeroshot_tasks": "colla"}, "--zeroshot_tasks 'colla' is no zero-shot task .did you mean 'cola'"),
}


@pytest.mark.parametrize("case", BAD)
def test_flags_that_do_not_go_together_are_told_before_anything_is_written(folder, tmp_path, case):
    changes, message = BAD[case]
    words = given(flags(folder, tmp_path / "run", **changes))
    with pytest.raises(ConfigError, match=message):
        planned(words)
    assert not (tmp_path / "run").exists()
