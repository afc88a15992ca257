"""The log of a run: metrics.jsonl, the console, and DeepSpeed's monitors (TensorBoard, wandb, csv, comet).

Rank 0 writes; on the other ranks every call does nothing. What fails to be logged never stops the training.
"""

from collections.abc import Callable
from pathlib import Path

from megagpt.secrets import hide
from megagpt.train import csv_files, events, report, wandb_run
from megagpt.train.console import open_console
from megagpt.train.metrics import MetricsFile
from megagpt.train.zeroshot import as_record

_SCALARS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "skipped_steps": "train/skipped_steps",
    "tokens": "train/tokens",
    "samples": "train/samples",
    "tokens_per_s": "perf/tokens_per_s",
    "step_ms": "perf/step_ms",
    "data_ms": "perf/data_ms",
    "tflops_per_gpu": "perf/tflops_per_gpu",
    "mfu": "perf/mfu",
    "memory_gb": "mem/peak_gb",
}
_CLASSIC = ("loss", "train_loss"), ("lr", "lr"), ("loss_scale", "loss_scale")


class RunLog:
    """Where the training loop reports to.

    ``monitor`` is the engine's: anything with ``write_events([(tag, value, x), ...])``. ``start_step`` is the step of
    the checkpoint the run goes on from; what an earlier start logged after it is removed, for it happens again.
    Raises StorageError when the run folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        total_steps: int,
        is_main: bool,
        monitor=None,
        start_step: int = 0,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.is_main = is_main
        self._monitor = monitor if is_main else None
        self._wandb = wandb_run.take(self._monitor)
        self._failed: set[str] = set()
        if is_main:
            last_step = start_step or -1  # a run that starts anew repeats its evaluation of step 0 too
            self._metrics = MetricsFile(self.run_dir, last_step)
            self._console = open_console(total_steps, start_step, self._metrics.skipped_steps)
            self._cut_monitors(last_step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def train(self, record: dict) -> None:
        """Log one training record, as :mod:`megagpt.train.loop` makes it: step, loss, lr {group: rate}, samples, ..."""
        if not self.is_main:
            return
        record = {key: value for key, value in record.items() if not (key == "mfu" and value is None)}
        self._write(record)
        self._console.train(record)
        self._send(_train_scalars(record), record["step"])

    def valid(self, name: str, record: dict, step: int) -> None:
        """Log what the evaluation on the validation set ``name`` gave at ``step``: loss, ppl, bits_per_byte, ..."""
        if not self.is_main:
            return
        named = {f"valid/{name}/{key}": value for key, value in record.items()}
        self._write({"step": step, **named})
        self._console.valid(name, record, step)
        self._send([(tag, value, step) for tag, value in named.items()], step)

    def cut(self, last_step: int) -> None:
        """The run has gone back to ``last_step``: what came later happens again."""
        if self.is_main:
            try:
                self._metrics.cut(last_step)
            except OSError as error:
                self._warn_once("metrics.jsonl", f"cannot be cut back ({error.strerror})")
            self._cut_monitors(last_step)

    def zeroshot(self, results: dict[str, dict], step: int) -> None:
        """Log the figures of tasks that the model was asked at ``step`` without being trained for them."""
        if not self.is_main:
            return
        named = as_record(results)
        self._write({"step": step, **named})
        scores = ", ".join(f"{task} {figures['score']:.2f}" for task, figures in results.items())
        self.message(f"zero-shot at iteration {step}: {scores}")
        self._send([(tag, value, step) for tag, value in named.items()], step)

    def message(self, text: str) -> None:
        """Show one line to the user."""
        if self.is_main:
            self._console.message(text)

    def sync(self) -> None:
        """Force metrics.jsonl to disk: with a checkpoint goes the log of the steps before it, whatever happens."""
        if self.is_main:
            self._try(self._metrics.sync)

    def finish(self, summary: dict) -> dict:
        """Write summary.json, summary.md and loss.png from ``summary`` and the metrics, and show what came out.

        The whole summary is returned.
        """
        if not self.is_main:
            return summary
        self.close()
        if self._wandb is not None:
            self._reached("wandb", self._wandb.finish)
        whole = report.write_summary(self.run_dir, summary)
        for line in report.outcome(self.run_dir, whole):
            self._console.message(line)
        return whole

    def close(self) -> None:
        """End the bar and close the files; a second call does nothing."""
        if self.is_main:
            self._console.close()
            self._metrics.close()

    def _cut_monitors(self, last_step: int) -> None:
        """Cut the monitors' files in the run folder; elsewhere may be those of other runs beside them."""
        tensorboard, csv = (getattr(self._monitor, f"{name}_monitor", None) for name in ("tb", "csv"))
        writer = getattr(tensorboard, "summary_writer", None)
        try:
            if writer is not None and self._is_ours(writer.log_dir):
                events.truncate(Path(writer.log_dir), last_step)
            if csv is not None and self._is_ours(csv.log_dir):
                # The first line of a file that is there need not be written again.
                csv.filenames = csv_files.truncate(Path(csv.log_dir), last_step)
        except OSError as error:
            self._warn_once("the monitors' files", f"of an earlier start cannot be cut back ({error.strerror})")

    def _is_ours(self, folder: str) -> bool:
        return Path(folder).resolve().is_relative_to(self.run_dir.resolve())

    def _write(self, record: dict) -> None:
        self._try(lambda: self._metrics.write(record))

    def _try(self, fn: Callable[[], None]) -> None:
        try:
            fn()
        except OSError as error:
            self._warn_once("metrics.jsonl", f"cannot be written ({error.strerror})")

    def _send(self, scalars: list[tuple], step: int) -> None:
        if self._monitor is not None and not self._reached("the monitor", lambda: self._monitor.write_events(scalars)):
            self._monitor = None
        if self._wandb is not None and not self._reached("wandb", lambda: self._wandb.write_events(scalars, step)):
            self._wandb = None

    def _reached(self, what: str, send: Callable[[], None]) -> bool:
        try:
            send()
        except Exception as error:  # each monitor has its own: a full disk, a lost network, a service's refusal
            self._warn_once(what, f"failed and is off from here on ({error})")
            return False
        return True

    def _warn_once(self, what: str, problem: str) -> None:
        if what not in self._failed:
            self._failed.add(what)
            self._console.message(hide(f"WARNING: {what} {problem}; training goes on"))


def _train_scalars(record: dict) -> list[tuple]:
    """(tag, value, x) of a training record: ours over steps, and DeepSpeed's classic names over consumed samples."""
    rates = record["lr"]
    scalars = [(f"train/lr/{group}", rate, record["step"]) for group, rate in rates.items()]
    scalars += [(tag, record[key], record["step"]) for key, tag in _SCALARS.items() if record.get(key) is not None]
    classic = {**record, "lr": max(rates.values())}
    scalars += [
        (f"Train/Samples/{name}", classic[key], record["samples"])
        for key, name in _CLASSIC
        if classic.get(key) is not None
    ]
    return scalars
