"""What starts ``finetune.py`` for its user: studies, as a loop and as a Slurm array, and the quickstart."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from finetune_common import ds_config, pretrained, write_csv
from slurm_common import stand_ins

from megagpt.cli import main as megagpt
from megagpt.tools import quickstart, quickstart_finetune

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def test_a_study_runs_finetune_py_as_a_slurm_array_and_by_itself(tmp_path, monkeypatch, capfd):
    """Two variants: a task of the array makes the first, the same command without --slurm the other one."""
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, ENV[name])
    monkeypatch.chdir(ROOT)
    train, valid = write_csv(tmp_path / "my.csv", 24), write_csv(tmp_path / "dev.csv", 9, 1)
    study = ["study", "layers", "--run_dir", tmp_path / "study", "--values", "0,3", "--seeds", 1]
    study += ["--launcher", f"{sys.executable} -u"]
    flags = ["--ds_config", ds_config(tmp_path), "--train", train, "--valid", valid, "--init_from", pretrained("pre")]
    flags += ["--epochs", 1, "--global_batch_size", 8]
    array, loop = ([str(word) for word in [*study, *more, "--", *flags]] for more in (["--slurm"], []))
    assert megagpt(array) == 0
    env = {**ENV, **stand_ins(tmp_path / "bin"), "SLURM_ARRAY_TASK_ID": "1", "PYTHON": sys.executable}
    script = ["bash", tmp_path / "study/array.sbatch"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "embeddings and 0 blocks pre-trained" in done.stdout
    assert megagpt(loop) == 0
    shown = capfd.readouterr().out
    assert "[1/1]" in shown  # the array has made the other one
    assert "embeddings and 3 blocks pre-trained" in shown
    rows = (tmp_path / "study/study.md").read_text().splitlines()[2:]
    assert [row.split("|")[1:3] for row in rows] == [[" transfer ", " 0 "], [" transfer ", " 3 "]]
    for k, row in zip((0, 3), rows, strict=True):
        summary = json.loads((tmp_path / f"study/{k}-1/summary.json").read_text())
        assert summary["n_transfer"] == k
        assert f" {100 * summary['metrics']['valid']['accuracy']:.2f} " in row


def test_the_quickstart_of_fine_tuning_compares_pre_training_with_none(tmp_path):
    home = tmp_path / "runs"
    folders = ["--task_data", tmp_path / "docstrings", "--run_dir", home, "--init_from", pretrained("pre")]
    done = subprocess.run(
        [sys.executable, "-m", "megagpt.tools.quickstart_finetune", *folders, "--epochs", "1", "--limit_train", "64"],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"(after pre-training|from scratch|largest package) +([\d.]+)%", done.stdout)
    assert [name for name, _ in found] == ["after pre-training", "from scratch", "largest package"]
    for name, (_, percent) in zip(("pretrained", "from_scratch"), found, strict=False):
        summary = json.loads((home / name / "summary.json").read_text())
        assert summary["from_scratch"] == (name == "from_scratch")
        assert summary["train_examples"] == 64
        assert f"{summary['metrics']['valid']['accuracy']:.1%}" == f"{percent}%"


def test_the_quickstart_of_fine_tuning_pre_trains_where_no_one_has(tmp_path, monkeypatch):
    """Its own model, once made, stays the one that it goes on from."""
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr(quickstart, "main", lambda argv: trained.append(argv) or 1)
    assert quickstart_finetune.main(["--run_dir", "runs/mine"]) == 1  # as the pre-training ends
    assert trained == [["--run_dir", "runs/mine/model", "--steps", "400"]]
    for path in (quickstart.RUN_DIR, tmp_path / "runs/mine/model"):
        path.mkdir(parents=True)
        (path / "summary.json").write_text("{}")
        assert quickstart_finetune._pretrained(tmp_path / "runs/mine") == path
