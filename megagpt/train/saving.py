"""When a run's checkpoints are written, what happens when that fails, and which are kept."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from megagpt import dist
from megagpt.errors import StorageError
from megagpt.train import checkpoint, kept_weights, manifest, retention
from megagpt.train import engine as deepspeed_engine
from megagpt.train.intervals import due
from megagpt.train.mirror import Mirror

_MAX_FAILED = 3  # periodic saves that may fail in a row


class Saver:
    """Writes the checkpoints of one run under ``root``, of ``state`` as it is when :meth:`save` is called.

    ``needed`` are about the bytes of one, ``keep_last`` how many stay beside the best, ``say`` shows a line and
    ``saved`` is told how many seconds one took. With ``in_background`` training waits only for a copy in memory.
    Checkpoints at multiples of ``keep_weights`` leave their weights behind.
    """

    def __init__(
        self,
        engine,
        root: Path,
        state: checkpoint.TrainState,
        config,
        *,
        needed: int,
        keep_last: int,
        say: Callable[[str], None],
        saved: Callable[[float], None],
        mirror: Mirror | None = None,
        in_background: bool = False,
        keep_weights: int = 0,
    ) -> None:
        self.mirror = mirror
        self._what = engine, root, state, config
        self._engine, self._root, self._state = engine, root, state
        self._needed = needed
        self._keep_last = keep_last
        self._say = say
        self._saved = saved
        self._in_background = in_background
        self._keep_weights = keep_weights
        self._unfinished: tuple[checkpoint.UnfinishedSave, tuple, float] | None = None
        # Resuming found these damaged, or it would have gone on from one of them.
        self._passed_over = {n for n in map(manifest.step_of, manifest.folders(root)) if n > state.step}
        self._failed = 0
        self.saved_step = state.step  # the checkpoint that the run goes on from, or there is nothing yet to save

    def keep_missing_weights(self) -> None:
        """Keep those that an earlier start has not come to; before a first save deletes their checkpoints."""
        if dist.is_main() and self._keep_weights:
            for line in kept_weights.keep_missing(self._root, self._keep_weights, self._passed_over):
                self._say(line)

    def save(self, *, final: bool, best: tuple) -> None:
        """Save the state; every rank calls this, after :meth:`settle`.

        ``best`` are loss and step of the best checkpoint that is there already. Raises StorageError where this is the
        ``final`` one, or too many in a row could not be written; otherwise a failure is told.
        """
        begun = time.perf_counter()
        step = self._state.step
        try:
            if self._in_background and not final:
                unfinished = checkpoint.begin(*self._what, needed=self._needed, in_background=True)
                self._unfinished = unfinished, best, begun
                self._say(f"saving step {step} in the background; training waited {time.perf_counter() - begun:.2f} s")
            else:
                self._note_saved(self._write(), step, begun)
        except StorageError as error:
            self._note_failed(error, step, best, final=final)

    def settle(self, *, wait: bool = True) -> bool:
        """Finish a save that goes on in the background, once all ranks have written their files; whether it was.

        With ``wait`` they are waited for. Every rank calls this. Raises StorageError for too many failures in a row.
        """
        if self._unfinished is None or not (wait or self._written_everywhere()):
            return False
        (unfinished, best, begun), self._unfinished = self._unfinished, None
        try:
            self._note_saved(unfinished.finish(), unfinished.state.step, begun)
        except StorageError as error:
            self._note_failed(error, unfinished.state.step, best, final=False)
        return True

    def _written_everywhere(self) -> bool:
        written = torch.tensor(float(self._unfinished[0].written()), device=self._engine.device)
        return float(deepspeed_engine.mean_over_ranks(written)) == 1.0

    def _write(self) -> Path:
        """The checkpoint's folder. Raises StorageError where it could not be written twice: disks stumble."""
        try:
            return checkpoint.save(*self._what, needed=self._needed)
        except StorageError as error:
            self._say(f"checkpoint of step {self._state.step} failed and is tried once more: {error}")
            return checkpoint.save(*self._what, needed=self._needed)

    def _note_saved(self, folder: Path, step: int, begun: float) -> None:
        seconds = time.perf_counter() - begun
        self._failed = 0
        self.saved_step = step
        self._saved(seconds)
        self._say(f"saved {folder} in {seconds:.1f} s")
        self._passed_over.discard(step)  # there is a good one now
        if dist.is_main():
            if due(step, self._keep_weights):
                self._say(kept_weights.keep(folder, is_new=True))
            keep = {self._state.best_step} - {None}
            if self.mirror is not None:
                self.mirror.start(folder, set(keep))
                keep |= self.mirror.in_use()
            retention.prune(self._root, self._keep_last, keep, self._passed_over)

    def _note_failed(self, error: StorageError, step: int, best: tuple, *, final: bool) -> None:
        self._failed += 1
        if final or self._failed >= _MAX_FAILED:
            raise error
        self._say(f"WARNING: checkpoint of step {step} failed, going on: {error}")
        self._state.best_loss, self._state.best_step = best  # the one that is there must not be pruned
