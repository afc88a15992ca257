"""One fine-tuning run: phase after phase, each with an engine of its own, then the answers of the best weights.

An engine knows only what its phase trains: the other parameters are absent from the optimiser and need no gradient, so
the backward pass ends where the frozen part begins. Weights pass from phase to phase in float32 through rank 0.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megagpt import dist
from megagpt.config import deepspeed as ds
from megagpt.dist import preflight
from megagpt.dist.rendezvous import meet
from megagpt.finetune import evaluation, results, weights
from megagpt.finetune.model import Classifier
from megagpt.finetune.phases import open_batches, open_engine, padding_line
from megagpt.finetune.plan import FinetunePlan, PhasePlan
from megagpt.finetune.score import METRICS, score
from megagpt.ops import Ops
from megagpt.train import checkpoint, folder, hardware, kernels, mirror, optim, report, restarts, resume, wandb_run
from megagpt.train import engine as deepspeed_engine
from megagpt.train.batches import BatchPlan
from megagpt.train.intervals import Intervals
from megagpt.train.log import RunLog
from megagpt.train.loop import Loop
from megagpt.train.mirror import Mirror
from megagpt.train.seeds import seed_all
from megagpt.train.stopping import StopRequests


def start(plan: FinetunePlan, world: dist.World, stop: StopRequests | None = None) -> torch.device:
    """Check the machine, start the process group and, with --preflight, look at all hosts.

    Raises ConfigError before anything of a run is written, or Stopped.
    """
    stop = stop or StopRequests()
    if plan.settings.deterministic:
        deepspeed_engine.make_deterministic()
    device = deepspeed_engine.device_of(world)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    ds.check_hardware(plan.config, device.type, capability)
    deepspeed_engine.check_async_io(plan.config)
    optim.check_available(plan.optimiser["optimizer"])
    kernels.load(plan, device)
    dist.export(world)
    timeout = plan.settings.distributed_timeout_minutes
    dist.watch(plan.settings.hang_timeout, 60 * timeout, world.local_world_size)
    deepspeed_engine.start_distributed(
        timeout,
        lambda: meet(world, plan.settings.run_dir, plan.settings.rendezvous_timeout, asked=stop.asked),
    )
    if plan.settings.preflight != "no":
        preflight.check(world, plan.run_dir, device, slow_too=plan.settings.preflight == "stop")
    return device


def finetune(plan: FinetunePlan, world: dist.World, device: torch.device, stop: StopRequests | None = None) -> None:
    """Run to the end; raises a MegaGPTError for whatever the user can mend, and Stopped where ``stop`` asks for it."""
    with opened(plan, world, device, stop or StopRequests()) as run:
        run.run()


@contextmanager
def opened(plan: FinetunePlan, world: dist.World, device: torch.device, stop: StopRequests) -> Iterator["Run"]:
    """The run with its folder to itself, before its first phase."""
    with folder.locked(plan.run_dir, plan.settings.mirror):
        stop.watch(plan.run_dir, plan.settings)
        needed = checkpoint.free_bytes_needed(plan.model.n_params(), plan.config)
        dist.everywhere(lambda: checkpoint.check_space(plan.run_dir, needed) if dist.is_main() else None)
        source, notes = resume.checkpoint_to_resume(plan)
        ops, choice = kernels.settle(plan, device, resumed=source is not None)
        description = {**plan.describe(), "kernels": kernels.describe(ops, choice)}
        run = Run(plan, world, device, ops, description, source, needed, notes, stop)
        try:
            yield run
        finally:
            run.close()


@dataclass
class Run:
    """What the phases of a run share."""

    plan: FinetunePlan
    world: dist.World
    device: torch.device
    ops: Ops
    description: dict  # for run.json
    source: Path | None  # the checkpoint that the run goes on from, until it is loaded
    checkpoint_bytes: int
    notes: list[str]
    stop: StopRequests
    log: RunLog | None = None
    state: checkpoint.TrainState = field(default_factory=checkpoint.TrainState)
    mirror: Mirror | None = None
    begun: float = field(default_factory=time.time)

    def run(self) -> None:
        plan = self.plan
        step = 0
        if self.source is not None:
            step = checkpoint.read_state(self.source).step
        index = next(p.index for p in plan.phases if step <= p.end)
        held = self.first_weights(index)
        for phase in plan.phases[index:]:
            held = self._phase(phase, held)
            if self._is_out_of_patience(phase):
                break
            if phase.index + 1 < len(plan.phases):
                dist.everywhere(lambda phase=phase, held=held: self._hand_over(phase, held))
        dist.everywhere(lambda held=held: self._keep_last(held))
        self._finish()

    def first_weights(self, index: int) -> weights.Weights:
        """What phase ``index`` begins with, on rank 0."""

        def read() -> weights.Weights:
            return weights.initial(self.plan) if index == 0 else weights.read(self._handed_over(index))

        return dist.everywhere(lambda: read() if dist.is_main() else {})

    def _handed_over(self, index: int) -> Path:
        """The weights with which phase ``index`` begins."""
        return self.plan.run_dir / "phases" / f"{index}.safetensors"

    def _hand_over(self, phase: PhasePlan, held: weights.Weights) -> None:
        if dist.is_main():
            weights.save(held, self._handed_over(phase.index + 1), self.plan)
            # This phase's own is needed as long as its last checkpoint is the newest one.
            self._handed_over(phase.index - 1).unlink(missing_ok=True)

    def _keep_last(self, held: weights.Weights) -> None:
        """Without a validation set the last weights are the best ones."""
        if dist.is_main() and self.state.best_step is None:
            weights.save(held, self.plan.run_dir / weights.MODEL, self.plan)

    # a phase ----------------------------------------------------------------------------------------------------

    def _phase(self, phase: PhasePlan, held: weights.Weights) -> weights.Weights:
        """Train one phase from ``held``; the weights after it, both on rank 0."""
        engine, loop = self.open_phase(phase, held)
        frozen = weights.digests(engine.module, lambda p: not p.requires_grad)
        while self.state.step < phase.end and not self._is_out_of_patience(phase):
            loop.advance()
        loop.saver.settle()
        weights.average_buffers(engine.module)
        if weights.digests(engine.module, lambda p: not p.requires_grad) != frozen:
            raise AssertionError(f"phase {phase.phase.name} changed parameters that it was to leave alone")
        held = weights.collect(engine, held, self.plan.config)
        engine.destroy()
        del loop, engine
        gc.collect()
        return held

    def open_phase(self, phase: PhasePlan, held: weights.Weights) -> tuple[object, Loop]:
        """A phase's engine and the loop that trains it, from ``held`` on rank 0 or the checkpoint to go on from."""
        plan = self.plan
        dist.beat("setup", self.state.step)
        seed_all(plan.settings.seed + 1 + self.world.rank + 1_000_003 * phase.index)
        if self.log is None and dist.is_main():
            wandb_run.announce(plan.run_dir, plan.config.config, resumed=self.source is not None)
        engine, rates = open_engine(plan, phase, held, self.ops, self.device, monitored=self.log is None)
        if self.source is not None:
            self.state, self.source = resume.load(engine, self.source, plan), None
        elif phase.index == 0:
            self.state = checkpoint.TrainState(model=plan.model.to_dict(), data=plan.identity)
        if self.log is None:
            self._open_log(engine)
        self._say_phase(phase, rates)
        return engine, self._loop(engine, phase, rates, held)

    def _loop(self, engine, phase: PhasePlan, rates: list[float], held: weights.Weights) -> Loop:
        plan, config = self.plan, self.plan.config
        engine.train()
        cut = BatchPlan(config.micro_batch, config.accumulation, self.world.world_size, self.world.rank)
        batches = open_batches(plan, phase, cut, self.state.step, self.device)
        self.log.message(padding_line(batches))
        settings = plan.settings
        return Loop(
            engine,
            config,
            make_batches=lambda _: batches,
            plan=cut,
            schedule=phase.schedule(),
            base_rates=rates,
            intervals=Intervals(
                phase.end,
                settings.log_interval,
                phase.steps_per_epoch,
                settings.save_interval,
                settings.keep_last,
                first=phase.first,
                save_evaluated=True,
                compare_ranks=settings.compare_ranks_interval,
            ),
            state=self.state,
            root=plan.root,
            checkpoint_bytes=self.checkpoint_bytes,
            evaluate=dict if phase.phase.objective == "lm" else (lambda: self._evaluate(engine)),
            log=self.log,
            tokens_of=lambda step: batches.tokens(step - phase.first),
            flops_per_token=plan.model.flops_per_token(),
            peak_flops=self._peak_flops(),
            forward=lambda engine, batch: engine(**batch),
            badness=self._badness,
            on_best=lambda: self._save_best(engine, held),
            before_save=lambda: weights.average_buffers(engine.module),
            stop=self.stop,
            mirror=self.mirror,
            async_save=plan.settings.async_save,
            on_nan=plan.settings.on_nan,
            spike_factor=plan.settings.spike_factor,
        )

    def _peak_flops(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return hardware.peak_flops(torch.cuda.get_device_name(self.device), self.plan.config.precision)

    def _say_phase(self, phase: PhasePlan, rates: list[float]) -> None:
        shown = ", ".join(f"{group} {rate:.4g}" for group, rate in phase.phase.rates().items())
        self.log.message(
            f"phase {phase.index + 1} of {len(self.plan.phases)}, {phase.phase.name}: {phase.phase.objective}, updates "
            f"{phase.first} to {phase.end}, highest rates {shown}"
        )

    def _is_out_of_patience(self, phase: PhasePlan) -> bool:
        """Whether the last phase has gone on for ``patience`` epochs without a better result."""
        patience, best = self.plan.settings.patience, self.state.best_step
        if patience is None or best is None or phase.index + 1 < len(self.plan.phases):
            return False
        return self.state.step - max(best, phase.first) >= patience * phase.steps_per_epoch

    # evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self, engine) -> dict[str, dict]:
        """Loss and metrics of every validation split."""
        weights.average_buffers(engine.module)
        engine.eval()
        found = {name: self._measure(engine.module, name)[1] for name in self.plan.data.valid}
        engine.train()
        return found

    def _measure(self, model: Classifier, split: str) -> tuple:
        """The outputs for a split, and its loss and metrics where its labels are known."""
        plan, encoded = self.plan, self.plan.splits[split]
        outputs, loss = evaluation.answers(
            model, encoded, device=self.device, rank=self.world.rank, world_size=self.world.world_size
        )
        if loss is None:
            return outputs, {}
        examples = {s.name: s for s in plan.data.splits()}[split].examples
        labels = [e.label for e in examples]
        metrics = score(plan.data.metrics, plan.data.kind, outputs, labels, ordinal=plan.data.ordinal)
        return outputs, {"loss": loss, **metrics}

    def _badness(self, found: dict[str, dict]) -> float:
        """The first metric on the first validation split, so that lower is better."""
        metric = self.plan.data.metrics[0]
        value = next(iter(found.values()))[metric]
        return value if METRICS[metric].lower_is_better else -value

    def _save_best(self, engine, held: weights.Weights) -> None:
        whole = weights.collect(engine, held, self.plan.config)
        path = self.plan.run_dir / weights.MODEL
        dist.everywhere(lambda: weights.save(whole, path, self.plan) if dist.is_main() else None)

    # beginning and end ------------------------------------------------------------------------------------------

    def _open_log(self, engine) -> None:
        plan, step = self.plan, self.state.step

        def opened() -> RunLog:
            if dist.is_main():
                restarts.begin(plan.run_dir, step, plan.settings.restart_limit)
                report.write_run(
                    plan.run_dir,
                    self.description,
                    start_step=step,
                    world_size=self.world.world_size,
                    tokenizer=plan.tokenizer_path,
                )
            return RunLog(
                plan.run_dir,
                total_steps=plan.total_steps,
                is_main=dist.is_main(),
                monitor=engine.monitor,
                start_step=step,
            )

        self.log = dist.everywhere(opened)
        self.mirror = mirror.of(plan.settings, self.log.message)
        for line in [*self.notes, *results.opening_lines(plan, self.ops, step)]:
            self.log.message(line)

    def _finish(self) -> None:
        """Predictions and metrics of the best weights, for every split but train."""
        plan = self.plan
        dist.beat("evaluation", self.state.step)
        if self.mirror is not None:
            self.mirror.finish()
        model = dist.everywhere(lambda: weights.load(plan.run_dir / weights.MODEL, self.device)[0])
        found = {}
        for split in [*plan.data.valid.values(), *plan.data.test.values()]:
            outputs, found[split.name] = self._measure(model, split.name)
            dist.everywhere(
                lambda split=split, outputs=outputs: (
                    results.write_predictions(plan.run_dir, split.name, split.examples, outputs, plan.spec)
                    if dist.is_main()
                    else None
                )
            )
        summary = results.summary(plan, self.state, found, time.time() - self.begun)
        for line in results.closing_lines(summary):
            self.log.message(line)
        self.log.finish(summary)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
