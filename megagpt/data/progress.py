"""How far a long job on files is: a live bar on a terminal, a line every few seconds elsewhere."""

import sys
import time

_LINE_EVERY_S = 10.0


class Progress:
    """Shows the share done of ``total``, in any unit, the bytes handled a second and the time left.

    ``done`` is what an earlier, interrupted job had done: it counts for the share and not for the rate.
    """

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self._label, self._total = label, max(total, 1)
        self._before, self._done = done, done
        self._bytes = 0
        self._begun = self._shown = time.monotonic()
        self._bar = _bar(label, self._total, done) if sys.stdout.isatty() else None

    def update(self, done: int, n_bytes: int, note: str = "") -> None:
        """``done`` of the total are done, ``n_bytes`` were handled by this job; ``note`` is shown with the rate."""
        self._done, self._bytes = done, n_bytes
        note = f"{self.megabytes_per_s:.1f} MB/s{note and ' | '}{note}"
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        elif time.monotonic() - self._shown > _LINE_EVERY_S:
            self._shown = time.monotonic()
            print(f"{self._label} {100 * done / self._total:.0f}% | {note} | ETA {self._eta()}", flush=True)

    @property
    def megabytes_per_s(self) -> float:
        """Bytes handled a second by this job, in units of 10**6."""
        return self._bytes / 1e6 / max(time.monotonic() - self._begun, 1e-9)

    def _eta(self) -> str:
        work = self._done - self._before
        seconds = (time.monotonic() - self._begun) * (self._total - self._done) / work if work > 0 else 0
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, error_type, *_) -> None:
        if self._bar:
            if error_type is None:  # a job may end a few bytes before or behind what was estimated
                self._bar.update(self._bar.task_ids[0], completed=self._total)
            self._bar.stop()


def _bar(label: str, total: int, done: int):
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    bar = Progress(*columns, TextColumn("ETA"), TimeRemainingColumn())
    bar.add_task(label, total=total, completed=done, note="")
    return bar
