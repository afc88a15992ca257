"""run.json, summary.json, summary.md and loss.png."""

import json
import subprocess

import pytest
from test_log_metrics import training_record

from megagpt.train import report
from megagpt.train.hardware import peak_flops
from megagpt.train.log import RunLog
from megagpt.version import __version__


def finished_run(run_dir, steps=20):
    with RunLog(run_dir, total_steps=steps, is_main=True) as log:
        for step in range(steps + 1):
            if step:
                log.train(training_record(step, tokens_per_s=1000.0 + step))
            if step % 10 == 0:
                log.valid("books", {"loss": 9.0 - 0.1 * step, "ppl": 99.0, "bits_per_byte": 2.0}, step)
        return log.finish({"model": "tiny", "validation_note": None})


def test_run_json_tells_settings_versions_and_machine(tmp_path):
    report.write_run(tmp_path, {"settings": {"lr": 1e-3}}, start_step=0, world_size=2)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"] == {"lr": 1e-3}
    assert run["versions"]["megagpt"] == __version__
    assert {"python", "torch", "deepspeed"} <= run["versions"].keys()
    assert run["starts"][0]["world_size"] == 2


def test_run_json_keeps_the_starts_of_a_run_and_forgets_those_of_another(tmp_path):
    for step in (0, 10, 20):
        report.write_run(tmp_path, {}, start_step=step, world_size=1)
    assert [s["step"] for s in json.loads((tmp_path / "run.json").read_text())["starts"]] == [0, 10, 20]
    report.write_run(tmp_path, {}, start_step=0, world_size=1)
    assert [s["step"] for s in json.loads((tmp_path / "run.json").read_text())["starts"]] == [0]


def test_a_run_folder_carries_its_tokenizer(tmp_path):
    (tmp_path / "books.tokenizer.json").write_text('{"a": 1}')
    run_dir = tmp_path / "run"
    report.write_run(run_dir, {}, start_step=0, world_size=1, tokenizer=tmp_path / "books.tokenizer.json")
    assert (run_dir / "tokenizer.json").read_text() == '{"a": 1}'


def test_the_git_commit_is_that_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.git_commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = report.git_commit()
    assert len(commit) == 40
    (tmp_path / "file").write_text("two")
    assert report.git_commit() == f"{commit}+changes"


def test_the_summary_has_first_last_and_best_evaluation(tmp_path):
    summary = finished_run(tmp_path)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 20
    assert summary["tokens"] == 20 * 128
    assert summary["tokens_per_s"] == 1010.5  # the median of 1001 ... 1020
    assert summary["all_starts_step_seconds"] == pytest.approx(20 * 0.128)
    books = summary["valid"]["books"]
    assert (books["first"]["step"], books["last"]["step"], books["best"]["step"]) == (0, 20, 20)
    assert books["last"] == {"step": 20, "loss": 7.0, "ppl": 99.0, "bits_per_byte": 2.0}


def test_the_end_of_a_run_shows_what_it_came_to(tmp_path, capsys):
    finished_run(tmp_path)
    *_, outcome, where = capsys.readouterr().out.splitlines()
    assert "loss 9.0000 at step 0, 7.0000 at step 20; bits per byte 2.0000 at step 0, 2.0000 at step 20" in outcome
    assert f"finished: {tmp_path / 'summary.md'}" in where


def test_an_evaluation_that_is_no_number_has_no_outcome(tmp_path):
    with RunLog(tmp_path, total_steps=1, is_main=True) as log:
        log.train(training_record(1))
        log.valid("books", {"loss": float("nan"), "ppl": float("nan")}, 1)
        assert log.finish({})["valid"] == {"books": {}}


def test_the_summary_for_people_shows_the_loss_curve(tmp_path):
    finished_run(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "| books (last) | 20 | 7 | 99 | - | 2 |" in text
    assert "![loss curve](loss.png)" in text
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_large_numbers_for_people_are_short(tmp_path):
    """The perplexity of a word before training had 22 digits."""
    text = report.to_markdown("run", {"word_ppl": 4.0468168e21, "tokens_per_s": 2953.4, "loss": 5.5, "x": 1e11}, None)
    cells = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| ")][1:5]
    assert cells == ["4.047e+21", "2,953", "5.5", "100,000,000,000"]


def test_the_metrics_of_a_fine_tuned_model_stand_above_a_constant_answer_s():
    evaluations = {"first": {"step": 5, "loss": 0.6, "accuracy": 0.5}, "best": {"step": 10, "loss": 0.4, "accuracy": 1}}
    summary = {
        "task": "mine",
        "best_step": 10,
        "best_epoch": 2,
        "metrics": {"valid": {"loss": 0.4, "accuracy": 0.9375, "f1": 0.95}, "test": {}},
        "constant": {"valid": {"accuracy": 0.5, "f1": 0.0}},
        "examples": {"train": 90, "valid": 1600, "test": 7},
        "valid": {"valid": evaluations},
    }
    lines = report.to_markdown("run", summary, None).splitlines()
    assert lines[2:8] == [
        "Best weights: step 10, epoch 2.",
        "",
        "| split | examples | loss | accuracy | f1 |",
        "|---|---:|---:|---:|---:|",
        "| valid | 1,600 | 0.4 | 0.9375 | 0.95 |",
        "| constant answer |  | - | 0.5 | 0 |",
    ]
    assert "| validation set | step | loss | accuracy |" in lines
    assert lines[-2:] == ["| valid (first) | 5 | 0.6 | 0.5 |", "| valid (lowest loss) | 10 | 0.4 | 1 |"]


def test_a_run_too_short_for_a_curve_says_so(tmp_path):
    summary = finished_run(tmp_path, steps=1)
    assert summary["loss_curve"] == "not drawn: fewer than two logged steps"
    assert "loss.png" not in (tmp_path / "summary.md").read_text()


def test_a_run_without_validation_has_no_empty_table(tmp_path):
    with RunLog(tmp_path, total_steps=1, is_main=True) as log:
        log.train(training_record(1))
        log.finish({})
    assert "validation set" not in (tmp_path / "summary.md").read_text()


def test_a_run_logged_once_but_evaluated_often_has_a_curve(tmp_path):
    """Ten steps and the default logging interval of ten: one training point, and every evaluation."""
    with RunLog(tmp_path, total_steps=10, is_main=True) as log:
        for step in (0, 5, 10):
            if step == 10:
                log.train(training_record(10))
            log.valid("books", {"loss": 5.0 - 0.1 * step, "ppl": 99.0}, step)
        assert log.finish({})["loss_curve"] == "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_in_steps_is_that_of_all_starts(tmp_path):
    """Two starts of five steps of 128 ms each."""
    for start, stop in ((0, 5), (5, 10)):
        with RunLog(tmp_path, total_steps=10, is_main=True, start_step=start) as log:
            for step in range(start, stop):
                log.train(training_record(step + 1))
            summary = log.finish({})
    assert summary["all_starts_step_seconds"] == pytest.approx(10 * 0.128)


def test_a_curve_is_drawn_over_steps_without_a_loss(tmp_path):
    with RunLog(tmp_path, total_steps=3, is_main=True) as log:
        for step, loss in ((1, 3.0), (2, float("nan")), (3, 2.0)):
            log.train(training_record(step, loss=loss))
        assert log.finish({})["loss_curve"] == "loss.png"


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA A100 80GB PCIe", "bf16", 312e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("Tesla V100-SXM2-16GB", "fp16", 125e12),
        ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA H200", "fp32", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("an accelerator of next year", "bf16", None),
    ],
)
def test_only_a_known_device_has_a_peak(device, precision, peak):
    assert peak_flops(device, precision) == peak
