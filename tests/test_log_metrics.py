"""metrics.jsonl: what a run writes, and what is left of it when the run goes on from a checkpoint."""

import json
import os
import subprocess
import sys

import pytest

from megagpt.errors import StorageError
from megagpt.train import metrics
from megagpt.train.log import RunLog


def training_record(step, **changed):
    """A record as the loop makes it, with 8 windows of 16 tokens a step."""
    record = {
        "step": step,
        "loss": 4.0 - 0.01 * step,
        "lr": {"decay": 1e-3, "no_decay": 2e-3},
        "grad_norm": 0.5,
        "loss_scale": None,
        "skipped_steps": 0,
        "tokens": 128 * step,
        "samples": 8 * step,
        "global_batch": 8,
        "tokens_per_s": 1000.0,
        "step_ms": 128.0,
        "data_ms": 0.1,
        "memory_gb": 0.2,
    }
    return {**record, **changed}


def logged(run_dir, steps, start_step=0, evaluate_at=()):
    """Log ``steps``; the records that are then in the file."""
    with RunLog(run_dir, total_steps=100, is_main=True, start_step=start_step) as log:
        for step in steps:
            log.train(training_record(step))
            if step in evaluate_at:
                log.valid("books", {"loss": 3.0, "ppl": 20.0, "bits_per_byte": 1.5}, step)
    return metrics.read(run_dir / "metrics.jsonl")


def test_a_training_line_has_the_documented_fields(tmp_path):
    assert logged(tmp_path, [1]) == [training_record(1)]


def test_an_evaluation_line_names_its_validation_set(tmp_path):
    line = logged(tmp_path, [1], evaluate_at=[1])[1]
    assert line == {
        "step": 1,
        "valid/books/loss": 3.0,
        "valid/books/ppl": 20.0,
        "valid/books/bits_per_byte": 1.5,
    }


def test_mfu_is_absent_where_the_hardware_is_unknown(tmp_path):
    with RunLog(tmp_path, total_steps=2, is_main=True) as log:
        log.train(training_record(1, mfu=None))
        log.train(training_record(2, mfu=0.4))
    first, second = metrics.read(tmp_path / "metrics.jsonl")
    assert "mfu" not in first
    assert second["mfu"] == 0.4


def test_numbers_that_are_not_finite_are_null_so_that_every_line_is_json(tmp_path):
    with RunLog(tmp_path, total_steps=1, is_main=True) as log:
        log.train(training_record(1, loss=float("nan"), grad_norm=float("inf"), lr={"decay": float("nan")}))
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    assert (record["loss"], record["grad_norm"], record["lr"]) == (None, None, {"decay": None})


def test_a_resumed_run_keeps_what_came_before_its_checkpoint_and_repeats_the_rest(tmp_path):
    logged(tmp_path, range(1, 8), evaluate_at=[4, 6])
    records = logged(tmp_path, range(5, 8), start_step=4, evaluate_at=[6])
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["step"] for r in records if "valid/books/loss" in r] == [4, 6]


def test_a_run_that_starts_anew_keeps_nothing_of_what_was_there(tmp_path):
    with RunLog(tmp_path, total_steps=9, is_main=True) as log:
        log.valid("books", {"loss": 9.0, "ppl": 8000.0}, 0)
        log.train(training_record(1))
    assert [r["step"] for r in logged(tmp_path, [1, 2])] == [1, 2]


def test_a_line_torn_by_a_kill_is_dropped_on_resume(tmp_path):
    logged(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 10)
    assert [r["step"] for r in logged(tmp_path, [3, 4], start_step=2)] == [1, 2, 3, 4]


def test_lines_are_in_the_file_as_soon_as_they_are_logged(tmp_path):
    with RunLog(tmp_path, total_steps=9, is_main=True) as log:
        log.train(training_record(1))
        assert len(metrics.read(tmp_path / "metrics.jsonl")) == 1


def test_other_ranks_write_nothing(tmp_path):
    run_dir = tmp_path / "run"
    with RunLog(run_dir, total_steps=9, is_main=False) as log:
        log.train(training_record(1))
        log.valid("books", {"loss": 3.0}, 1)
        log.message("hello")
        log.finish({})
    assert not run_dir.exists()


def test_a_run_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="choose another --run_dir"):
        RunLog(tmp_path / "file" / "run", total_steps=1, is_main=True)


def test_a_full_disk_while_logging_warns_once_and_training_goes_on(tmp_path):
    """/dev/full takes no byte, like a disk that has filled up since the run began."""
    script = """
import sys
from test_log_metrics import training_record
from megagpt.train.log import RunLog
log = RunLog(sys.argv[1], total_steps=9, is_main=True)
log._metrics._file.close()
log._metrics._file = open("/dev/full", "w")
for step in (1, 2, 3):
    log.train(training_record(step))
log.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("WARNING: metrics.jsonl cannot be written (No space left on device)") == 1
    assert "iteration        3/" in done.stdout
