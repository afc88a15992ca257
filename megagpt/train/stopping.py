"""Stopping a run between two steps with its checkpoint written: on a signal, a file, or before the time is up.

Whatever asks only leaves a mark. All ranks look at their marks at the same step boundary, agree on the strongest, save,
and end with exit code 75. Torch is imported late: signals are heeded from the first second on.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megagpt import dist
from megagpt.config.shared import stop_signal
from megagpt.dist.jobtime import JobEnd
from megagpt.errors import ConfigError

NOTHING, SAVE, STOP = range(3)
STOP_FILE, SAVE_FILE = "stop", "save"  # in the run folder
_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_EVERY = 0.2  # seconds between agreements, where steps are shorter than that
_MARGIN = 30.0  # seconds before the end of the job by which a run has saved
_BYTES_PER_SECOND = 1e8  # at which a checkpoint is expected to be written before one has been


class StopRequests:
    """What asks this run to stop or to save; :func:`listening` makes one and :meth:`watch` tells it of the run."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self._signal: signal.Signals | None = None
        self._run_dir: Path | None = None
        self._minutes: float | None = None
        self._job_end = JobEnd({})
        self._looked = float("-inf")
        self._steps_left = 1  # until ranks agree again
        self._steps_between = 1
        self._agreed: float | None = None  # when
        self._step_seconds = 0.0  # about the longest of the last steps, with what came between them
        self._save_seconds: list[float] = []
        self._handlers: dict[signal.Signals, object] = {}  # what was there before
        self._is_orphan = False
        self.reason = ""
        self.stopped = False

    def watch(self, run_dir: Path, settings, env: Mapping[str, str] = os.environ) -> None:
        """Heed the files in ``run_dir``, the flags in ``settings`` and the end of the job. Every rank calls this.

        Raises ConfigError where an earlier start was stopped by a file that is still there: a job that is requeued
        would start for nothing, again and again.
        """
        dist.everywhere(lambda: _refuse_stopped(run_dir) if dist.is_main() else None)
        self._run_dir, self._minutes = run_dir, settings.exit_duration_in_mins
        if settings.exit_signal:
            self.listen(stop_signal(settings.exit_signal))
        if dist.is_main():
            self._job_end = JobEnd(env)
            self._job_end.refresh()

    def saved(self, seconds: float) -> None:
        """Note how long a checkpoint took."""
        self._save_seconds = [*self._save_seconds[-99:], seconds]

    def look_again(self) -> None:
        """Agree at the next boundary: what lies behind took long. Every rank calls this."""
        self._steps_left = 1

    def agree(self, device, *, checkpoint_bytes: int = 0, soon: float = 0.0) -> int:
        """What all ranks do at this boundary: NOTHING, SAVE or STOP; ``reason`` then says why. Every rank calls this.

        ``soon`` are seconds of an evaluation that may come before the next boundary. Between agreements lie so many
        steps as make up a fifth of a second, so that short steps don't pay for them.
        """
        self._steps_left -= 1
        if self._steps_left:
            return NOTHING
        now = time.monotonic()
        seconds = 0.0 if self._agreed is None else (now - self._agreed) / self._steps_between
        self._step_seconds = max(0.9 * self._step_seconds, seconds)
        self._agreed = now
        expected = max(self._save_seconds, default=checkpoint_bytes / _BYTES_PER_SECOND) + soon
        own, reason = self._request(now, expected + self._step_seconds * (1 + self._steps_between))
        level, seconds = _strongest(own, seconds, device)
        self._steps_between = self._steps_left = min(100, max(1, int(_EVERY / seconds))) if seconds else 1
        if level != NOTHING:
            self.reason = next(filter(None, dist.gather_json(reason if own == level else None)))
            self.stopped = level == STOP
            if level == SAVE and dist.is_main():
                (self._run_dir / SAVE_FILE).unlink(missing_ok=True)
        return level

    def asked(self) -> str:
        """Why this process has to stop, whatever it is doing; empty while nobody asks. Whoever is told does stop."""
        self.stopped = self.stopped or self._signal is not None or self._is_orphan
        if self._signal is not None:
            return f"{self._signal.name} on rank {os.environ.get('RANK', '0')}"
        return "the launcher has ended" if self._is_orphan else ""

    def _request(self, now: float, needed: float) -> tuple[int, str]:
        """The strongest request on this rank and its reason; ``needed`` are the seconds that stopping later takes."""
        if reason := self.asked():
            return STOP, reason
        if self._minutes is not None and now - self.begun >= 60 * self._minutes:
            return STOP, f"--exit_duration_in_mins {self._minutes:g}"
        if self._run_dir is None or not dist.is_main() or now - self._looked < 1.0:
            return NOTHING, ""
        self._looked = now
        self._job_end.refresh()
        end = self._job_end.time
        if end is not None and time.time() + needed + _MARGIN >= end:
            return STOP, f"the job ends at {time.strftime('%H:%M:%S', time.localtime(end))}"
        if (self._run_dir / STOP_FILE).exists():
            return STOP, f"the file {self._run_dir / STOP_FILE}"
        if (self._run_dir / SAVE_FILE).exists():
            return SAVE, f"the file {self._run_dir / SAVE_FILE}"
        return NOTHING, ""

    def listen(self, number: signal.Signals) -> None:
        """From now on ``number`` is a request to stop, in this process and not in those forked from it."""
        self._handlers.setdefault(number, signal.getsignal(number))
        signal.signal(number, self._heed)

    def _heed(self, number: int, frame) -> None:
        self._signal = self._signal or signal.Signals(number)

    def orphaned(self) -> None:
        """The launcher has ended: save what there is."""
        self._is_orphan = True

    def forget(self) -> None:
        """In a forked child: a worker that ignored TERM would outlive its parent's patience."""
        for number in self._handlers:
            signal.signal(number, signal.SIG_DFL)

    def close(self) -> None:
        """Put the former handlers back; a run that stops ignores the signals from here on.

        A job that is requeued gets a TERM as well, which must not change the exit code of a process on its way out.
        """
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self.stopped else handler)


def _strongest(level: int, seconds: float, device) -> tuple[int, float]:
    """The highest of all ranks' levels and step times: one small all-reduce."""
    if "torch" not in sys.modules:
        return level, seconds
    from torch import distributed

    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return level, seconds
    import torch

    both = torch.tensor([level, seconds], dtype=torch.float64, device=device)
    distributed.all_reduce(both, op=distributed.ReduceOp.MAX)
    level, seconds = both.tolist()
    return int(level), seconds


@contextmanager
def listening() -> Iterator[StopRequests]:
    """Inside, SIGUSR1 and SIGTERM ask the run to stop."""
    requests = StopRequests()
    for number in _SIGNALS:
        requests.listen(number)
    _open.append(requests)
    try:
        yield requests
    finally:
        _open.remove(requests)
        requests.close()


_open: list[StopRequests] = []


def _forget() -> None:
    while _open:
        _open.pop().forget()


os.register_at_fork(after_in_child=_forget)


def _refuse_stopped(run_dir: Path) -> None:
    path = run_dir / STOP_FILE
    if path.exists():
        raise ConfigError(f"the file {path} says that this run is to stand still; remove it to go on")
