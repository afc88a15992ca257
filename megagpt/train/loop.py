"""The training loop: fetch, forward, backward, step, then log, evaluate, save."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagpt import dist
from megagpt.errors import NumericError, Stopped
from megagpt.train import checkpoint, manifest, postmortem, replicas, rewind
from megagpt.train import engine as deepspeed_engine
from megagpt.train.batches import MicroBatches, ranges, without
from megagpt.train.intervals import Intervals, due, due_doubling
from megagpt.train.mirror import Mirror
from megagpt.train.numeric import Numbers
from megagpt.train.rewind import Rewinder
from megagpt.train.saving import Saver
from megagpt.train.schedule import Schedule
from megagpt.train.stopping import NOTHING, STOP, StopRequests
from megagpt.train.stragglers import RankTimes


def next_token_loss(engine, ids: Tensor) -> Tensor:
    """The mean loss of predicting each of ids (B, T + 1) but the first."""
    return engine(ids[:, :-1], ids[:, 1:])


def mean_loss(results: dict[str, dict]) -> float:
    """The mean over the validation sets of the loss on each."""
    return sum(record["loss"] for record in results.values()) / len(results)


class Loop:
    """One training run from ``state.step`` to ``intervals.total``.

    ``forward(engine, batch)`` is a micro-batch's loss and ``tokens_of(step)`` the number of tokens in a global batch.
    ``evaluate()`` returns {name: {"loss": ...}} over the validation sets (empty without any) and leaves the model in
    training mode and every random generator as it was; so does ``zeroshot()``, with {task: figures}. The checkpoint
    with the lowest ``badness(results)`` is the best one; ``on_best()`` is called when a new one is saved and
    ``before_save()`` before each save, both on every rank.
    With a ``rewinder`` a bad update takes the run back to its last checkpoint, and ``make_batches(state)`` gives the
    batches from there.
    """

    def __init__(
        self,
        engine,
        config,
        *,
        make_batches: Callable[[checkpoint.TrainState], MicroBatches],
        plan,
        schedule: Schedule,
        base_rates: list[float],
        intervals: Intervals,
        state: checkpoint.TrainState,
        root: Path,
        checkpoint_bytes: int,
        evaluate: Callable[[], dict[str, dict]],
        log,
        tokens_of: Callable[[int], int],
        flops_per_token: float,
        peak_flops: float | None,
        forward: Callable = next_token_loss,
        badness: Callable[[dict[str, dict]], float] = mean_loss,
        on_best: Callable[[], None] = lambda: None,
        before_save: Callable[[], None] = lambda: None,
        stop: StopRequests | None = None,
        mirror: Mirror | None = None,
        async_save: bool = False,
        on_nan: str = "skip",
        spike_factor: float | None = None,
        rewinder: Rewinder | None = None,
        zeroshot: Callable[[], dict[str, dict]] | None = None,
    ) -> None:
        self.engine = engine
        self.config = config
        self.batches = make_batches(state)
        self.plan = plan
        self.schedule = schedule
        self.base_rates = base_rates
        self.intervals = intervals
        self.state = state
        self.root = root
        self.checkpoint_bytes = checkpoint_bytes
        self.evaluate = evaluate
        self.log = log
        self.tokens_of = tokens_of
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.forward = forward
        self.badness = badness
        self.on_best = on_best
        self.before_save = before_save
        self.zeroshot = zeroshot
        self.stop = stop or StopRequests()
        self.saver = Saver(
            engine,
            root,
            state,
            config,
            needed=checkpoint_bytes,
            keep_last=intervals.keep_last,
            say=log.message,
            saved=self.stop.saved,
            mirror=mirror,
            in_background=async_save,
            keep_weights=intervals.keep_weights,
        )
        self.last_valid: dict[str, dict] = {}
        self.numbers = Numbers(engine, config, state, on_nan=on_nan, spike_factor=spike_factor)
        self._rewinder, self._make_batches = rewinder, make_batches
        self._evidence = postmortem.Evidence(root, engine.module, forward)
        self._rank_times = RankTimes(engine.device)
        self._evaluation_seconds = 0.0
        self._is_warm = False  # the first step compiles and reads cold files
        self._mark_time()

    def run(self) -> None:
        """Train to the end. Raises NumericError, StorageError, Stopped, or whatever broke; saved work stays saved."""
        self.engine.train()
        self.saver.keep_missing_weights()
        try:
            while self.state.step < self.intervals.total:
                self.advance()
        except KeyboardInterrupt:
            saved = next(map(manifest.step_of, manifest.folders(self.root)), 0)
            self.log.message(f"interrupted after step {self.state.step}; the same command goes on from step {saved}")
            raise

    def advance(self) -> None:
        """One optimiser step, and what is due after it. Raises Stopped, with everything saved, when asked to stop."""
        if self.saver.settle(wait=False):
            self._mark_time()
        self._heed_requests()
        try:
            loss = self._step()
            if self.numbers.is_bad and self._rewinder is not None and self._went_back():
                return
        except NumericError as error:
            raise NumericError(f"{error}; {self._evidence.write(str(error))} has the last steps") from None
        self._after_step(loss)

    def _went_back(self) -> bool:
        """Go back to the last checkpoint without the samples of the last update; False where there is none yet."""
        dist.beat("save", self.state.step)
        self.saver.settle()
        folder = self._rewinder.target(self.state)
        what = f"step {self.state.step}: {self.numbers.what()}"
        if folder is None:
            self.log.message(f"WARNING: {what}; the update is skipped, for there is no checkpoint yet to go back to")
            return False
        path = self._evidence.write(what)
        samples = self._samples()
        shown = ", ".join(f"{first} to {end - 1}" for first, end in ranges(samples))
        self._rewinder.go_back(self.state, folder, samples)
        self.batches.close()
        self.batches = self._make_batches(self.state)
        self.log.cut(self.state.step)
        self.numbers.start_counting()
        self.saver.saved_step = self.state.step
        self.log.message(
            f"WARNING: {what}; went back to {folder.name} and leaves out samples {shown} from here on; "
            f"{path} has the last steps"
        )
        self._mark_time()
        return True

    def _samples(self) -> np.ndarray:
        """The samples of the last update, ascending."""
        last = np.arange(self.state.samples - self.plan.global_batch, self.state.samples)
        return without(rewind.left_out(self.state.rewinds), last)

    def _heed_requests(self) -> None:
        step = self.state.step + 1 - self.intervals.first
        evaluates = due(step, self.intervals.evaluate) or due_doubling(step, self.intervals.zeroshot)
        soon = self._evaluation_seconds if evaluates else 0
        level = self.stop.agree(self.engine.device, checkpoint_bytes=self.checkpoint_bytes, soon=soon)
        if level == NOTHING:
            return
        self.saver.settle()
        if self.state.step > self.saver.saved_step:
            self._save(final=level == STOP, evaluated=False)
        if level == STOP:
            self.log.message(
                f"stopped after step {self.state.step} ({self.stop.reason}); the same command goes on from there"
            )
            raise Stopped(self.stop.reason)

    # one optimiser step -----------------------------------------------------------------------------------------

    def _step(self) -> Tensor:
        """Forward, backward and update over one global batch; this rank's mean loss, not yet read from the device."""
        self._set_rates()
        loss, last = 0.0, self.plan.accumulation - 1
        self._evidence.begin()
        self.numbers.before_update()
        for micro_step in range(self.plan.accumulation):
            dist.beat("step" if self._is_warm else "setup", self.state.step + 1)
            self._rank_times.begin()
            micro_loss = self.forward(self.engine, self._evidence.add_batch(self.batches.next()))
            self._rank_times.end()
            loss = loss + micro_loss.detach()
            if micro_step == last:
                micro_loss = self.numbers.refuse_spike(micro_loss, loss / self.plan.accumulation)
            deepspeed_engine.backward(self.engine, micro_loss)
            self._engine_step()
        self.state.samples += self.plan.global_batch
        self.state.tokens += self.tokens_of(self.state.step)
        self.state.step += 1
        self._is_warm = True
        loss = loss / self.plan.accumulation
        skipped = self.numbers.judge(loss)
        norm = self.engine.get_global_grad_norm()
        self._evidence.add(self.state.step, loss, norm, skipped, ranges(self._samples()))
        self.numbers.stop_if_due()
        return loss

    def _set_rates(self) -> None:
        """Every group's rate for the coming update; an update that was skipped has not advanced the schedule."""
        multiplier = self.schedule.multiplier(self.state.step - self.engine.skipped_steps)
        for group, rate in zip(self.engine.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * multiplier

    def _engine_step(self) -> None:
        try:
            self.engine.step()
        except Exception as error:
            # DeepSpeed raises a bare Exception when fp16's loss scale has nowhere left to go.
            if "loss scale" not in str(error):
                raise
            raise NumericError(
                f"step {self.state.step + 1}: the fp16 loss scale fell to its minimum and gradients still overflow; "
                "use bf16, a lower --lr or a longer --warmup_steps, and resume from the last checkpoint"
            ) from None

    # what happens between steps ---------------------------------------------------------------------------------

    def _after_step(self, loss: Tensor) -> None:
        step, last = self.state.step - self.intervals.first, self.state.step >= self.intervals.total
        if due(step, self.intervals.log) or last:
            self._log(loss)
        if due(step, self.intervals.compare_ranks):
            replicas.check(self.engine, self.config, self.state.step)
        evaluated = bool(due(step, self.intervals.evaluate) or last) and self.run_evaluation()
        if due_doubling(step, self.intervals.zeroshot) or last:
            self.ask_tasks()
        # While updates are skipped the run may be lost, and its checkpoints must not push out those from before.
        wanted = due(step, self.intervals.save) or (evaluated and self.intervals.save_evaluated)
        if (wanted and not self.numbers.in_trouble) or last:
            self._save(final=last, evaluated=evaluated)

    def _log(self, loss: Tensor) -> None:
        mean = float(deepspeed_engine.mean_over_ranks(loss))  # waits for the device: the clock is read after it
        steps = self.state.step - self._marked_step
        seconds = max(time.perf_counter() - self._marked_time, 1e-9)
        tokens_per_s = (self.state.tokens - self._marked_tokens) / seconds
        record = {
            "step": self.state.step,
            "loss": mean,
            "lr": {group["name"]: group["lr"] for group in self.engine.optimizer.param_groups},
            "grad_norm": deepspeed_engine.grad_norm(self.engine),
            "loss_scale": deepspeed_engine.loss_scale(self.engine),
            "skipped_steps": self.engine.skipped_steps,
            "nan_steps": self.state.nan_steps,  # of these, without fp16's search for its loss scale
            "tokens": self.state.tokens,
            "samples": self.state.samples,
            "global_batch": self.plan.global_batch,
            "tokens_per_s": tokens_per_s,
            "step_ms": 1e3 * seconds / steps,
            "data_ms": 1e3 * (self.batches.wait_s - self._marked_wait) / steps,
            "memory_gb": memory_gb(),
        }
        spread, slow = self._rank_times.gather(steps)
        if spread:
            record["rank_ms"] = spread
        if self.engine.device.type == "cuda":
            record["tflops_per_gpu"] = tokens_per_s * self.flops_per_token / self.plan.world_size / 1e12
        if self.peak_flops:
            record["mfu"] = tokens_per_s * self.flops_per_token / (self.peak_flops * self.plan.world_size)
        self.log.train(record)
        for line in slow:
            self.log.message(line)
        self._mark_time()

    def run_evaluation(self) -> bool:
        """Evaluate and log; False when there is no validation set."""
        begun = time.perf_counter()
        dist.beat("evaluation", self.state.step)
        results = self.evaluate()
        self._evaluation_seconds = max(self._evaluation_seconds, time.perf_counter() - begun)
        for name, record in results.items():
            self.log.valid(name, record, self.state.step)
        self.last_valid = results
        self.stop.look_again()
        self._mark_time()
        return bool(results)

    def ask_tasks(self) -> None:
        """Ask the tasks that the model is not trained for, if there are any, and log how it does."""
        if self.zeroshot is None:
            return
        begun = time.perf_counter()
        dist.beat("evaluation", self.state.step)
        results = self.zeroshot()
        self._evaluation_seconds = max(self._evaluation_seconds, time.perf_counter() - begun)
        self.log.zeroshot(results, self.state.step)
        self.stop.look_again()
        self._mark_time()

    def _mark_time(self) -> None:
        """From here on counts for the next log line: evaluation and saving are not part of a step's time."""
        self._marked_time = time.perf_counter()
        self._marked_step = self.state.step
        self._marked_tokens = self.state.tokens
        self._marked_wait = self.batches.wait_s

    # saving -----------------------------------------------------------------------------------------------------

    def _save(self, *, final: bool, evaluated: bool) -> None:
        dist.beat("save", self.state.step)
        self.stop.look_again()
        self.saver.settle()
        self.before_save()
        best = self.state.best_loss, self.state.best_step
        if evaluated and self._note_best():
            self.on_best()  # before the checkpoint that says so: a run that goes on from it does not repeat it
        self.log.sync()
        self.saver.save(final=final, best=best)
        self._mark_time()

    def _note_best(self) -> bool:
        """The best checkpoint is the saved one that did best on the validation sets at its own step; is it this one?"""
        loss = self.badness(self.last_valid)
        if self.state.best_loss is not None and loss >= self.state.best_loss:
            return False
        self.state.best_loss, self.state.best_step = loss, self.state.step
        return True


def memory_gb() -> float:
    """Peak device memory in use, or on a CPU the peak resident memory of this process, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
