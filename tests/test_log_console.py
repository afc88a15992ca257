"""What the user sees: a bar on a terminal, lines elsewhere."""

import os
import pty
import re
import subprocess
import sys

import pytest
from test_log_metrics import training_record

from megagpt.train.console import Lines, Pace
from megagpt.train.log import RunLog

SCRIPT = """
import sys
from test_log_metrics import training_record
from megagpt.train.log import RunLog
with RunLog(sys.argv[1], total_steps=200, is_main=True, start_step=100) as log:
    log.train(training_record(150, loss=3.25))
    log.valid("books", {"loss": 3.0, "ppl": 20.09, "bits_per_byte": 1.5}, 150)
    log.message("saved runs/[x]/global_step150")
"""


def in_a_terminal(*arguments, columns=100):
    """What a process writes when its output is a pseudo-terminal."""
    ours, theirs = pty.openpty()
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "xterm-256color",
        "COLUMNS": str(columns),
    }
    with subprocess.Popen(arguments, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        output = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux reports a closed terminal as an input/output error
                break
            if not chunk:
                break
            output += chunk
    os.close(ours)
    assert process.returncode == 0, output.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())


def test_a_terminal_shows_a_bar_with_loss_speed_and_remaining_time(tmp_path):
    seen = in_a_terminal(sys.executable, "-c", SCRIPT, str(tmp_path))
    assert re.search(r"step 150/200 .*loss 3.2500 · 1.0k tokens/s · eta 0:00:06", seen)
    assert "step 150 valid/books: loss 3.0000 · ppl 20.09 · 1.5000 bits per byte" in seen
    assert "saved runs/[x]/global_step150" in seen
    assert "iteration" not in seen


def test_a_log_has_one_line_an_interval_with_labels_that_megatrons_readers_know(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=200, is_main=True) as log:
        log.train(training_record(150, loss_scale=65536.0, skipped_steps=2, tflops_per_gpu=123.44))
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration      150/     200 \| ", line)
    fields = dict(part.split(": ", 1) for part in line.split(" | ")[1:])
    assert float(fields["lm loss"]) == 2.5
    assert float(fields["learning rate"]) == 2e-3
    assert float(fields["loss scale"]) == 65536
    assert int(fields["consumed samples"]) == 1200
    assert float(fields["elapsed time per iteration (ms)"]) == 128
    assert float(fields["throughput per GPU (TFLOP/s/GPU)"]) == 123.4
    assert int(fields["global batch size"]) == 8
    assert int(fields["number of skipped iterations"]) == 2


def test_an_evaluation_is_one_line_of_a_log(capsys):
    Lines(9, Pace(9)).valid("books", {"loss": 3.0, "ppl": 20.0, "bits_per_byte": 1.5}, 4)
    (line,) = capsys.readouterr().out.splitlines()
    assert "validation loss at iteration 4 | set: books | loss: 3.000000E+00 | ppl: 2.0" in line
    assert line.endswith("| bits per byte: 1.5000 |")


def test_an_evaluation_on_a_task_shows_its_metrics(capsys):
    Lines(9, Pace(9)).valid("dev", {"loss": 0.5, "accuracy": 0.875, "macro_f1": 0.8}, 4)
    assert capsys.readouterr().out.endswith("set: dev | loss: 5.000000E-01 | accuracy: 0.8750 | macro_f1: 0.8000 |\n")


def test_skipped_iterations_are_counted_since_the_line_before(capsys):
    lines = Lines(9, Pace(9))
    for step, skipped in ((1, 1), (2, 1), (3, 3)):
        lines.train(training_record(step, skipped_steps=skipped))
    counts = re.findall(r"number of skipped iterations: +(\d+)", capsys.readouterr().out)
    assert counts == ["1", "0", "2"]


def test_a_resumed_run_does_not_count_again_what_it_had_skipped_before(tmp_path, capsys):
    for start, step, skipped in ((0, 4, 3), (4, 5, 4)):
        with RunLog(tmp_path, total_steps=9, is_main=True, start_step=start) as log:
            log.train(training_record(step, skipped_steps=skipped))
    counts = re.findall(r"number of skipped iterations: +(\d+)", capsys.readouterr().out)
    assert counts == ["3", "1"]


def test_a_loss_that_is_no_number_is_shown_as_such(capsys):
    Lines(9, Pace(9)).train(training_record(1, loss=float("nan")))
    assert "lm loss: NAN" in capsys.readouterr().out


@pytest.mark.parametrize(("elapsed", "eta"), [(10.0, "0:01:20"), (20.0, "0:02:40")], ids=str)
def test_remaining_time_follows_the_steps_since_the_first_logged_one(monkeypatch, elapsed, eta):
    """20 of 100 steps are done, 10 of them in ``elapsed`` seconds since the first logged step; 80 are left."""
    clock = iter([100.0, 100.0 + elapsed])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    pace = Pace(100)
    assert pace.eta(10, 500.0) == "0:00:45"  # nothing but the step's own time is known yet
    assert pace.eta(20, 500.0) == eta
