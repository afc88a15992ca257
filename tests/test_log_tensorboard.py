"""What reaches DeepSpeed's monitors, read back with TensorBoard's own reader."""

from distributed import run_ranks
from test_log_metrics import training_record

from megagpt.train import csv_files
from megagpt.train.log import RunLog


def _log_with_deepspeeds_monitor(folder, start_step, steps, run_dir=None):
    """What a run in ``run_dir``, or in ``folder`` itself, sends to the monitors whose files are in ``folder``."""

    from deepspeed.monitor.config import get_monitor_config
    from deepspeed.monitor.monitor import MonitorMaster

    from megagpt.train.engine import start_distributed, stop_distributed

    start_distributed(timeout_minutes=1)
    sections = {
        "tensorboard": {"enabled": True, "output_path": str(folder), "job_name": "tb"},
        "csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"},
    }
    monitor = MonitorMaster(get_monitor_config(sections))
    with RunLog(run_dir or folder, total_steps=9, is_main=True, monitor=monitor, start_step=start_step) as log:
        for step in steps:
            log.train(training_record(step, loss_scale=8.0, mfu=0.5))
            if step % 2 == 0:
                log.valid("books", {"loss": 3.0, "ppl": 20.0}, step)
    stop_distributed()


def scalars(run_dir):
    """{tag: [x, ...]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tb"))
    accumulator.Reload()
    return {tag: [e.step for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_our_tags_over_steps_and_the_classic_ones_over_samples(tmp_path):
    run_ranks(_log_with_deepspeeds_monitor, 1, tmp_path, 0, [1, 2])
    curves = scalars(tmp_path)
    ours = {"train/loss", "train/lr/decay", "train/lr/no_decay", "train/grad_norm", "train/loss_scale"}
    ours |= {"train/tokens", "train/samples", "train/skipped_steps", "perf/tokens_per_s", "perf/step_ms"}
    ours |= {"perf/data_ms", "perf/mfu", "mem/peak_gb"}
    classic = {"Train/Samples/train_loss", "Train/Samples/lr", "Train/Samples/loss_scale"}
    assert curves.keys() == ours | classic | {"valid/books/loss", "valid/books/ppl"}
    assert all(curves[tag] == [1, 2] for tag in ours)
    assert all(curves[tag] == [8, 16] for tag in classic)
    assert curves["valid/books/loss"] == [2]
    assert (tmp_path / "csv" / "train_loss.csv").exists()


def test_the_curves_of_a_resumed_run_do_not_overlap(tmp_path):
    run_ranks(_log_with_deepspeeds_monitor, 1, tmp_path, 0, range(1, 8))
    run_ranks(_log_with_deepspeeds_monitor, 1, tmp_path, 4, range(5, 8))
    curves = scalars(tmp_path)
    assert curves["train/loss"] == [1, 2, 3, 4, 5, 6, 7]
    assert curves["Train/Samples/train_loss"] == [8 * step for step in range(1, 8)]
    assert curves["valid/books/ppl"] == [2, 4, 6]
    tables = {path.stem: path.read_text().splitlines() for path in (tmp_path / "csv").glob("*.csv")}
    assert tables["train_loss"] == ["step,loss", *(f"{step},{4 - 0.01 * step}" for step in range(1, 8))]
    assert [line.partition(",")[0] for line in tables["valid_books_ppl"]] == ["step", "2", "4", "6"]
    classic = [line.partition(",")[0] for line in tables["Train_Samples_lr"]]
    assert classic == ["step", *(str(8 * step) for step in range(1, 8))]


def test_a_run_that_starts_anew_leaves_nothing_of_an_earlier_one_in_its_tables(tmp_path):
    for name, lines in {"train_loss": "1,2.0\n2,1.", "Train_Samples_lr": "8,1.0\n", "empty": ""}.items():
        (tmp_path / f"{name}.csv").write_text(f"step,x\n{lines}" if lines else "")
    assert set(csv_files.truncate(tmp_path, -1)) == {"train_loss", "Train_Samples_lr"}
    assert (tmp_path / "train_loss.csv").read_text().splitlines() == ["step,x"]
    assert csv_files.truncate(tmp_path / "none", 3) == []


def test_what_lies_outside_of_the_run_folder_is_not_cut(tmp_path):
    """Two runs with one output_path and job_name: the second one to begin emptied the first one's curves."""
    run_ranks(_log_with_deepspeeds_monitor, 1, tmp_path, 0, [1, 2])
    run_ranks(_log_with_deepspeeds_monitor, 1, tmp_path, 0, [1, 2], tmp_path / "another run")
    assert scalars(tmp_path)["train/loss"] == [1, 2, 1, 2]
    assert len((tmp_path / "csv" / "train_loss.csv").read_text().splitlines()) == 6


def test_a_damaged_event_ends_what_is_kept_and_not_the_run(tmp_path):
    run_ranks(_log_with_deepspeeds_monitor, 1, tmp_path, 0, range(1, 4))
    (events,) = (tmp_path / "tb").glob("events.*")
    data = bytearray(events.read_bytes())
    data[-40:-20] = b"\xff" * 20
    events.write_bytes(data)
    run_ranks(_log_with_deepspeeds_monitor, 1, tmp_path, 3, [4])
    assert scalars(tmp_path)["train/loss"] == [1, 2, 3, 4]


def test_a_monitor_that_fails_is_switched_off_and_training_goes_on(tmp_path, capsys):
    class Broken:
        def write_events(self, events):
            raise ConnectionError("the service is gone")

    with RunLog(tmp_path, total_steps=9, is_main=True, monitor=Broken()) as log:
        log.train(training_record(1))
        log.train(training_record(2))
    assert capsys.readouterr().out.count("the monitor failed and is off from here on (the service is gone)") == 1
