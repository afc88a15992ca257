"""What a run shows while it goes: a live bar on a terminal, one grep-able line a logging interval anywhere else."""

import os
import sys
import time
from datetime import datetime, timedelta


def is_terminal() -> bool:
    """True where a bar can be drawn: the launchers hand their own standard output down to the ranks."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


class Pace:
    """The time to the end of a run, from the mean step since the first logged one, evaluations and saves included.

    The steps before it don't count: they hold compilation and the first reads of the data.
    """

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._first: tuple[int, float] | None = None

    def eta(self, step: int, step_ms: float) -> str:
        """The remaining time as h:mm:ss; ``step_ms`` serves until there are two logged steps."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        seconds = (now - first_time) / (step - first_step) if step > first_step else step_ms / 1e3
        return str(timedelta(seconds=round(seconds * max(0, self.total_steps - step))))


class Lines:
    """Plain lines on standard output, with the labels of Megatron-LM's log so that its readers work.

    ``skipped`` is how many updates the run had skipped at its last line before this start.
    """

    def __init__(self, total_steps: int, pace: Pace, skipped: int = 0) -> None:
        self.total_steps = total_steps
        self.pace = pace
        self._skipped = skipped

    def train(self, record: dict) -> None:
        skipped, tflops = record.get("skipped_steps", 0), record.get("tflops_per_gpu")
        fields = [
            f"iteration {record['step']:8d}/{self.total_steps:8d}",
            f"consumed samples: {record['samples']:12d}",
            f"consumed tokens: {record['tokens']:12d}",
            f"elapsed time per iteration (ms): {record['step_ms']:.1f}",
            *([f"throughput per GPU (TFLOP/s/GPU): {tflops:.1f}"] if tflops is not None else []),
            f"tokens per second: {record['tokens_per_s']:.0f}",
            f"data (ms): {record['data_ms']:.1f}",
            f"memory (GB): {record['memory_gb']:.2f}",
            *([f"mfu: {record['mfu']:.3f}"] if record.get("mfu") is not None else []),
            f"learning rate: {max(record['lr'].values()):.6E}",
            *([f"global batch size: {record['global_batch']:5d}"] if "global_batch" in record else []),
            f"lm loss: {record['loss']:.6E}",
            *([f"loss scale: {record['loss_scale']:.1f}"] if record.get("loss_scale") is not None else []),
            *([f"grad norm: {record['grad_norm']:.3f}"] if record.get("grad_norm") is not None else []),
            f"number of skipped iterations: {max(0, skipped - self._skipped):3d}",
            f"nan iterations so far: {record.get('nan_steps', 0):3d}",
            f"eta: {self.pace.eta(record['step'], record['step_ms'])}",
        ]
        self._skipped = skipped
        self._print(" | ".join(fields) + " |")

    def valid(self, name: str, record: dict, step: int) -> None:
        formats = {"loss": "loss: {:.6E}", "ppl": "ppl: {:.6E}", "word_ppl": "word ppl: {:.6E}"}
        fields = _formatted(record, {**formats, "bits_per_byte": "bits per byte: {:.4f}"}, "{}: {:.4f}")
        self._print(" | ".join([f"validation loss at iteration {step}", f"set: {name}", *fields]) + " |")

    def message(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        """Nothing is held."""

    def _print(self, text: str) -> None:
        print(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {text}", flush=True)


class Bar:
    """A live bar with loss, tokens a second and time to the end; messages appear above it."""

    def __init__(self, total_steps: int, start_step: int, pace: Pace) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.pace = pace
        self._console = Console(highlight=False, markup=False, emoji=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            refresh_per_second=2,
            expand=True,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, status="starting")
        self._progress.start()

    def train(self, record: dict) -> None:
        parts = [
            f"loss {record['loss']:.4f}",
            f"{_short(record['tokens_per_s'])} tokens/s",
            *([f"mfu {record['mfu']:.1%}"] if record.get("mfu") is not None else []),
            f"eta {self.pace.eta(record['step'], record['step_ms'])}",
        ]
        self._progress.update(self._task, completed=record["step"], status=" · ".join(parts))

    def valid(self, name: str, record: dict, step: int) -> None:
        formats = {"loss": "loss {:.4f}", "ppl": "ppl {:.4g}", "word_ppl": "word ppl {:.4g}"}
        fields = _formatted(record, {**formats, "bits_per_byte": "{:.4f} bits per byte"}, "{} {:.4f}")
        self.message(f"step {step} valid/{name}: {' · '.join(fields)}")

    def message(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def open_console(total_steps: int, start_step: int, skipped: int) -> Lines | Bar:
    """The console that suits where standard output goes; ``skipped`` as in :class:`Lines`."""
    pace = Pace(total_steps)
    return Bar(total_steps, start_step, pace) if is_terminal() else Lines(total_steps, pace, skipped)


def _formatted(record: dict, formats: dict[str, str], other: str) -> list[str]:
    """The values of ``record`` that ``formats`` names, in the order of ``formats``, then a task's metrics."""
    known = [text.format(record[key]) for key, text in formats.items() if key in record]
    return known + [other.format(key, value) for key, value in record.items() if key not in formats]


def _short(n: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f}{unit}"
    return f"{n:.0f}"
