"""Runs side by side, submissions to GLUE, studies: from folders as finished runs leave them."""

import csv
import json
import os
import subprocess
import zipfile

import pytest
from slurm_common import stand_ins

from megagpt.cli import main
from megagpt.errors import ConfigError, DataError
from megagpt.finetune import glue, report
from megagpt.finetune.papers import ABLATIONS, GPT1
from megagpt.finetune.study import StudySettings, points_of


def write_run(folder, task, metrics, *, predictions=None, **rest):
    """A finished run; ``metrics`` of its validation splits, ``predictions`` {split: [(id, label)]}."""
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"task": task, "metrics": metrics, **rest}))
    for split, rows in (predictions or {}).items():
        (folder / "predictions").mkdir(exist_ok=True)
        lines = ["id\tlabel\tp0", *(f"{name}\t{label}\t0.5" for name, label in rows)]
        (folder / "predictions" / f"{split}.tsv").write_text("\n".join(lines) + "\n")


def dev(**metrics):
    return {"dev": metrics}


def test_a_line_has_the_median_and_the_range_over_seeds_beside_constant_and_paper(tmp_path):
    for seed, value in enumerate((0.5, 0.9, 0.6)):
        metrics = {**dev(loss=0.7, accuracy=value), "test": {}}  # as a run with a test file without labels leaves it
        write_run(tmp_path / f"rte-{seed}", "rte", metrics, seed=seed, constant=dev(accuracy=0.5271))
    (tmp_path / "study.md").write_text("notes")
    assert report.read_run(tmp_path / "study.md") is None  # which Python 3.10 finds among the folders
    (line,) = report.lines_of(report.find_runs([tmp_path]))
    assert line.values == (50.0, 60.0, 90.0)
    assert (line.median, line.constant, line.published) == (60.0, 52.71, 56.0)
    row = report.to_markdown([line]).splitlines()[-1]
    assert row == "| rte | dev | full |  | accuracy | 60.00 | 50.00-90.00 | 3 | 52.71 | 56.0 |"


@pytest.mark.parametrize(
    ("summary", "variant"),
    [
        ({}, "full"),
        ({"recipe": "gpt1", "head": "linear", "lm_coef": 0.5}, "full"),
        ({"lm_coef": 0}, "no auxiliary LM"),
        ({"from_scratch": True, "n_transfer": -1, "n_layer": 12}, "from scratch"),
        ({"n_transfer": 12, "n_layer": 12}, "full"),
        ({"n_transfer": 0, "n_layer": 12}, "0 of 12 blocks"),
        ({"recipe": "ulmfit", "lm_coef": 0}, "ulmfit"),
        ({"recipe": "ulmfit", "head": "pooled_mlp", "limit_train": 500}, "ulmfit, 500 examples"),
        ({"recipe": "ulmfit", "head": "linear"}, "ulmfit, head linear"),
        ({"head": "pooled_mlp"}, "head pooled_mlp"),
        ({"backbone": "lstm"}, "LSTM"),
    ],
)
def test_a_run_is_named_by_what_it_does_otherwise_than_the_paper(summary, variant):
    assert report.variant_of(summary) == variant


def test_variants_are_lines_of_their_own_and_ablations_stand_beside_the_paper_s(tmp_path):
    write_run(tmp_path / "a", "cola", dev(matthews=0.4, accuracy=0.8))
    write_run(tmp_path / "b", "cola", dev(matthews=0.1, accuracy=0.7), from_scratch=True)
    lines = report.lines_of(report.find_runs([tmp_path / "a", tmp_path / "b"]))
    found = [(line.variant, line.metric, line.published) for line in lines]
    assert found == [
        ("full", "matthews", 45.4),
        ("full", "accuracy", None),
        ("from scratch", "matthews", 18.9),
        ("from scratch", "accuracy", None),
    ]


def test_runs_at_other_rates_are_no_seeds_of_one_another(tmp_path):
    for i, (lr, epochs) in enumerate([(1e-3, 3), (1e-3, 3), (2e-4, 3), (2e-4, 8)]):
        write_run(tmp_path / f"a{i}", "rte", dev(accuracy=0.5 + 0.1 * i), seed=i, lr=lr, epochs=epochs)
    write_run(tmp_path / "b", "trec", dev(accuracy=0.5), lr=1e-3, epochs=3)
    found = {(line.task, line.variant): line.values for line in report.lines_of(report.find_runs([tmp_path]))}
    assert found == {
        ("rte", "full, lr 0.001, 3 epochs"): (50.0, 60.0),
        ("rte", "full, lr 0.0002, 3 epochs"): (70.0,),
        ("rte", "full, lr 0.0002, 8 epochs"): (80.0,),
        ("trec", "full"): (50.0,),
    }


def test_a_result_of_ulmfit_stands_beside_its_article_s(tmp_path):
    write_run(tmp_path / "a", "airline", dev(accuracy=0.8), recipe="ulmfit", head="pooled_mlp", lm_coef=0)
    assert [line.published for line in report.lines_of(report.find_runs([tmp_path]))] == [82.93]


def test_race_is_also_judged_over_both_levels_each_question_once(tmp_path):
    metrics = {"high": {"accuracy": 0.5}, "middle": {"accuracy": 0.75}}
    write_run(tmp_path / "race", "race", metrics, examples={"high": 300, "middle": 100})
    lines = {line.split: (line.median, line.published) for line in report.lines_of(report.find_runs([tmp_path]))}
    assert lines == {"high": (50.0, 57.4), "middle": (75.0, 62.9), "all": (56.25, 59.0)}


def test_the_average_of_glue_needs_all_tasks_and_counts_mnli_once(tmp_path):
    for task in report.GLUE_TASKS[:-1]:
        metrics = dev(m=0.5) if task != "mnli" else {"matched": {"m": 0.9}, "mismatched": {"m": 0.7}}
        write_run(tmp_path / task, task, metrics)
    assert all(line.task != "glue" for line in report.lines_of(report.find_runs([tmp_path])))
    write_run(tmp_path / "rte", "rte", dev(m=0.5))
    average = report.lines_of(report.find_runs([tmp_path]))[-1]
    assert (average.task, average.published) == ("glue", 74.7)
    assert average.median == pytest.approx((7 * 50 + 80) / 8)


@pytest.mark.parametrize("variant", ["full", "no auxiliary LM", "LSTM"])
def test_the_paper_s_averages_are_those_of_its_rows(variant):
    row = dict(ABLATIONS[variant])
    assert row.pop("glue") == pytest.approx(sum(row.values()) / len(row), abs=0.1)  # the paper prints one digit


def test_the_paper_s_tables_agree_on_the_full_method():
    tasks = set(report.GLUE_TASKS) - {"mnli"}  # on which they give one split and both
    assert {task: ABLATIONS["full"][task] for task in tasks} == {task: GPT1[task] for task in tasks}


def test_the_report_is_written_for_people_programs_and_as_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/a", "stsb", dev(pearson=0.81), seed=1)
    write_run(tmp_path / "runs/b", "stsb", dev(pearson=0.83), seed=2)
    assert main(["finetune", "report", "runs/a", "runs/b", "--output", "out/table"]) == 0
    assert "| stsb | dev | full |  | pearson | 82.00 | 81.00-83.00 | 2 |  | 82.0 |" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "out/table.csv").open())
    assert (row["median"], row["value_1"], row["value_2"], row["paper"]) == ("82.0000", "81.0000", "83.0000", "82.0000")
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out/table.png").read_bytes().startswith(b"\x89PNG")


def test_folders_without_a_finished_run_are_an_error(tmp_path, capsys):
    assert main(["finetune", "report", str(tmp_path)]) == 2
    assert "no finished fine-tuning run" in capsys.readouterr().err
    assert main(["finetune", "reprot"]) == 2
    assert "did you mean 'report'" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        report.find_runs([tmp_path])


def submission(tmp_path, *, fill):
    rows = {"test": [("0", "1"), ("1", "0")]}
    write_run(tmp_path / "cola-1", "cola", dev(matthews=0.2), predictions={"test": [("0", "0"), ("1", "0")]})
    write_run(tmp_path / "cola-2", "cola", dev(matthews=0.4), predictions=rows)
    write_run(tmp_path / "stsb", "stsb", dev(pearson=0.4), predictions={"test": [("0", "5.2"), ("1", "3.14159")]})
    nli = {"test_matched": [("7", "neutral")], "diagnostic": [("0", "entailment")]}
    write_run(tmp_path / "mnli", "mnli", {"matched": {"accuracy": 0.7}}, predictions=nli)
    notes = glue.write_submission(report.find_runs([tmp_path]), tmp_path / "glue.zip", fill=fill)
    with zipfile.ZipFile(tmp_path / "glue.zip") as archive:
        return notes, {name: archive.read(name).decode() for name in archive.namelist()}


def test_a_submission_holds_the_best_run_s_answers_in_the_server_s_form(tmp_path):
    notes, files = submission(tmp_path, fill=True)
    assert set(files) == set(glue.FILES)
    assert files["CoLA.tsv"] == "index\tprediction\n0\t1\n1\t0\n"
    assert files["STS-B.tsv"] == "index\tprediction\n0\t5.000\n1\t3.142\n"
    assert files["MNLI-m.tsv"] == "index\tprediction\n7\tneutral\n"
    assert files["AX.tsv"] == "index\tprediction\n0\tentailment\n"
    assert files["WNLI.tsv"].splitlines()[-1] == "145\t0"
    assert "WNLI.tsv: no run, a constant answer" in notes
    assert "CoLA.tsv: 2 rows where the public test file has 1,063" in notes


def test_a_submission_with_missing_tasks_is_refused_unless_filled(tmp_path):
    with pytest.raises(DataError, match=r"no run has predictions for SST-2\.tsv, .*--fill"):
        submission(tmp_path, fill=False)


def study(kind, *passed, **settings):
    points = points_of(kind, StudySettings(run_dir="s", **settings), passed)
    return [(p.curve, p.x, " ".join(p.command[2:])) for p in points]


def test_a_study_of_layers_takes_over_each_number_of_blocks(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"model": {"n_layer": 2}}))
    runs = study("layers", "--task", "rte", "--init_from", str(tmp_path), seeds="1,2")
    assert [(x, command.split(" --seed ")[1]) for _, x, command in runs] == [
        (k, f"{seed} --run_dir s/{k}-{seed}") for k in (0, 1, 2) for seed in (1, 2)
    ]
    assert f"--task rte --init_from {tmp_path} --n_transfer 2 --seed 1" in runs[4][2]


def test_a_study_of_sizes_has_three_curves():
    runs = study("size", "--init_from", "r", "--lm_coef", "0.3", seeds="1", values="100,all")
    flags = {x: [command.removeprefix("--init_from r ").split(" --seed")[0] for _, y, command in runs if y == x]
             for x in (100, "all")}  # fmt: skip
    assert flags[100] == [
        "--lm_coef 0.3 --limit_train 100",
        "--limit_train 100 --lm_coef 0",
        "--lm_coef 0.3 --limit_train 100 --from_scratch",
    ]
    assert flags["all"] == ["--lm_coef 0.3", "--lm_coef 0", "--lm_coef 0.3 --from_scratch"]
    assert [curve for curve, _, _ in runs[:3]] == ["with auxiliary LM", "no auxiliary LM", "from scratch"]
    assert runs[1][2].endswith("--seed 1 --run_dir s/no-auxiliary-lm-100-1")


def test_a_study_of_ablations_has_an_lstm_where_there_is_one():
    runs = study("ablation", "--init_from", "r", seeds="1")
    assert [x for _, x, _ in runs] == ["full", "no auxiliary LM", "from scratch"]
    last = study("ablation", "--task", "rte", "--init_from=r", seeds="1", lstm_from="l")[-1]
    assert last == ("ablation", "LSTM", "--task rte --init_from l --seed 1 --run_dir s/lstm-1")


@pytest.mark.parametrize(
    ("settings", "passed", "message"),
    [
        ({}, ["--task", "rte"], "needs --init_from"),
        ({"seeds": "a"}, ["--init_from", "r"], "--seeds 'a' is not a list of whole numbers"),
        ({"values": "0,x"}, ["--init_from", "r"], "--values '0,x' is not a list"),
        ({}, ["--init_from", "r", "--seed", "1"], "--seed after -- is what the study varies"),
        ({}, ["--init_from", "r", "--task", "glue"], "--task glue names several tasks and a study is of one"),
        ({}, ["--init_from", "nowhere"], "nowhere/run.json does not tell the number of blocks; give --values"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused(settings, passed, message):
    with pytest.raises(ConfigError) as error:
        points_of("layers", StudySettings(run_dir="s", **settings), passed)
    assert message in str(error.value)


# Stands in for a launcher with finetune.py: writes the summary of a run whose accuracy follows from its flags.
TRAINER = """#!/usr/bin/env python3
import json, pathlib, sys
words = sys.argv[next(i for i, word in enumerate(sys.argv) if word.endswith("finetune.py")) + 1 :]
flags = dict(zip(words[::2], words[1::2]))
folder = pathlib.Path(flags["--run_dir"])
folder.mkdir(parents=True, exist_ok=True)
(folder / "flags.json").write_text(json.dumps(flags))
value = 0.5 + int(flags["--n_transfer"]) / 10 + int(flags["--seed"]) / 100
summary = {"task": "rte", "metrics": {"dev": {"accuracy": value}}, "train_examples": 9}
(folder / "summary.json").write_text(json.dumps(summary))
print("ran", folder)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "launch"
    path.write_text(TRAINER)
    path.chmod(0o755)
    return ["study", "layers", "--run_dir", "s", "--seeds", "1,2", "--values", "0,3", "--launcher", str(path)]


def test_a_study_makes_the_missing_runs_and_collects_all(tmp_path, trainer, capfd):
    command = [*trainer, "--", "--task", "rte", "--init_from", "r"]
    write_run(tmp_path / "s/0-1", "rte", dev(accuracy=0.25))
    assert main(command) == 0
    shown = capfd.readouterr().out
    assert "ran s/0-2" in shown
    assert "ran s/0-1" not in shown
    assert "| transfer | 0 | 38.50 | 25.00-52.00 | 2 |" in shown
    assert "| transfer | 3 | 81.50 | 81.00-82.00 | 2 |" in shown
    rows = list(csv.DictReader((tmp_path / "s/study.csv").open()))
    assert [(row["x"], row["median"]) for row in rows] == [("0", "38.5000"), ("3", "81.5000")]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "s/study.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_ends_with_the_exit_code_of_a_run_that_fails(trainer, capfd):
    assert main([*trainer[:-1], "false", "--", "--init_from", "r"]) == 1
    assert "goes on with the runs that are missing" in capfd.readouterr().out


def test_a_study_as_a_slurm_array_has_a_task_for_each_missing_run(tmp_path, trainer, capsys):
    command = [*trainer, "--slurm", "--", "--task", "rte", "--init_from", "my 'run'"]
    assert main(command) == 0
    assert "4 runs are missing; start them with: sbatch s/array.sbatch" in capsys.readouterr().out
    script = (tmp_path / "s/array.sbatch").read_text()
    assert "#SBATCH --array=1-4\n" in script
    assert "#SBATCH --requeue\n" in script  # the shipped script's own
    env = {**os.environ, **stand_ins(tmp_path / "bin"), "PYTHON": str(tmp_path / "launch")}
    for task in range(1, 5):
        env |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": str(task)}
        subprocess.run(["bash", "s/array.sbatch"], env=env, check=True, timeout=60)
    assert json.loads((tmp_path / "s/3-2/flags.json").read_text())["--init_from"] == "my 'run'"
    assert main(command) == 0
    assert "| transfer | 3 | 81.50 |" in capsys.readouterr().out


def test_a_study_in_a_folder_that_sbatch_cannot_be_told_is_refused(trainer, capsys):
    trainer[trainer.index("s")] = "a b"
    assert main([*trainer, "--slurm", "--", "--init_from", "r"]) == 2
    assert "cannot stand in a batch script" in capsys.readouterr().err
