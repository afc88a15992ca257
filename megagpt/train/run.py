"""One training run, put together: plan, model, engine, checkpoint, log and loop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megagpt import dist
from megagpt.config import deepspeed as ds
from megagpt.dist import preflight
from megagpt.dist.rendezvous import meet
from megagpt.errors import CheckpointError, Stopped
from megagpt.evaluate import perplexity
from megagpt.model.gpt import GPT, decays
from megagpt.ops import Ops
from megagpt.train import (
    checkpoint,
    folder,
    hardware,
    kept_weights,
    kernels,
    manifest,
    mirror,
    optim,
    report,
    restarts,
    resume,
    rewind,
    wandb_run,
    zeroshot,
)
from megagpt.train import engine as deepspeed_engine
from megagpt.train.batches import BatchPlan, MicroBatches
from megagpt.train.corpus import data_lines
from megagpt.train.intervals import Intervals
from megagpt.train.log import RunLog
from megagpt.train.loop import Loop
from megagpt.train.plan import Plan
from megagpt.train.seeds import seed_all
from megagpt.train.stopping import StopRequests
from megagpt.train.weights import read_weights


def train(plan: Plan, world: dist.World, stop: StopRequests | None = None) -> None:
    """Run to the end; raises a MegaGPTError for whatever the user can mend, and Stopped where ``stop`` asks for it."""
    stop = stop or StopRequests()
    begun = time.time()
    if plan.settings.deterministic:
        deepspeed_engine.make_deterministic()
    device = deepspeed_engine.device_of(world)
    _check_machine(plan, device)
    dist.export(world)
    timeout = plan.settings.distributed_timeout_minutes
    dist.watch(plan.settings.hang_timeout, 60 * timeout, world.local_world_size)
    deepspeed_engine.start_distributed(
        timeout,
        lambda: meet(world, plan.settings.run_dir, plan.settings.rendezvous_timeout, asked=stop.asked),
    )
    with folder.locked(plan.run_dir, plan.settings.mirror):
        needed = _checkpoint_bytes(plan)
        kept = min(_weights_to_come(plan), kept_weights.bytes_of(plan.model.n_params()))
        dist.everywhere(lambda: checkpoint.check_space(plan.run_dir, needed, kept) if dist.is_main() else None)
        if plan.settings.preflight != "no":
            preflight.check(world, plan.run_dir, device, slow_too=plan.settings.preflight == "stop")
        stop.watch(plan.run_dir, plan.settings)
        try:
            _train(plan, world, device, begun, stop)
        except Stopped:  # on all ranks
            deepspeed_engine.stop_distributed()
            raise
    # Only after success: a rank that failed alone must end, and not wait here for peers that wait for it.
    deepspeed_engine.stop_distributed()


def _checkpoint_bytes(plan: Plan) -> int:
    return checkpoint.free_bytes_needed(plan.model.n_params(), plan.config)


def _weights_to_come(plan: Plan) -> int:
    """Bytes of the weights that the run has still to keep."""
    interval = plan.settings.keep_weights_interval
    return kept_weights.bytes_to_come(plan.run_dir, plan.model.n_params(), plan.total_steps, interval)


def _check_machine(plan: Plan, device: torch.device) -> None:
    """Raise ConfigError for what this machine does not offer, before anything is written."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    ds.check_hardware(plan.config, device.type, capability)
    deepspeed_engine.check_async_io(plan.config)
    optim.check_available(plan.optimiser["optimizer"])
    kernels.load(plan, device)


def _train(plan: Plan, world: dist.World, device: torch.device, begun: float, stop: StopRequests) -> None:
    with opened(plan, world, device, stop) as loop:
        if loop.state.step == 0:
            loop.run_evaluation()
            loop.ask_tasks()
        loop.run()
        if loop.saver.mirror is not None:
            loop.saver.mirror.finish()
        checkpoint_folder = plan.root / manifest.tag_name(loop.state.step)
        last = {"last_start_wall_seconds": time.time() - begun, "checkpoint": str(checkpoint_folder)}
        if plan.zeroshot is not None and dist.is_main():
            loop.log.sync()
            for line in zeroshot.write_trajectory(plan.run_dir, plan.zeroshot):
                loop.log.message(line)
        loop.log.finish({**plan.summary(), **last, "rewinds": len(loop.state.rewinds)})


@contextmanager
def opened(plan: Plan, world: dist.World, device: torch.device, stop: StopRequests | None = None) -> Iterator[Loop]:
    """The loop of a run, ready for its next step: model, engine and log are made, a checkpoint is loaded.

    The process group has been started; the run folder is locked where other jobs could want it.
    """
    settings, config = plan.settings, plan.config
    source, notes = resume.checkpoint_to_resume(plan)
    seed_all(settings.seed)
    ops, choice = kernels.settle(plan, device, resumed=source is not None)
    with device, deepspeed_engine.sharded_construction(config):
        model = GPT(plan.model, ops)
    if source is None and plan.init_weights is not None:
        _load_weights(model, plan, ops)
    # From here on the generators of the ranks differ: each drops its own units.
    seed_all(settings.seed + 1 + world.rank)
    optimizer, optimizer_line = _build_optimizer(model, plan, device)
    if dist.is_main():
        wandb_run.announce(plan.run_dir, config.config, resumed=source is not None)
    engine = deepspeed_engine.build_engine(model, optimizer, config)
    state = checkpoint.TrainState(model=plan.model.to_dict(), data=plan.identity)
    if source is not None:
        state = resume.load(engine, source, plan)
    state.rewinds = rewind.known(plan.run_dir, state)

    batch = BatchPlan(config.micro_batch, config.accumulation, world.world_size, world.rank)
    description = {**plan.describe(), "kernels": kernels.describe(ops, choice)}
    with dist.everywhere(lambda: _open_log(plan, description, engine, state.step, world)) as log:
        for line in [
            *notes,
            *kept_weights.space_warnings(plan.run_dir, _checkpoint_bytes(plan), _weights_to_come(plan)),
            f"model {plan.model_name}: {plan.model.n_params():,} parameters",
            f"kernels {ops.name}: {ops.reason}",
            *([str(choice)] if choice.milliseconds else []),
            f"optimizer: {optimizer_line}",
            f"ZeRO stage {config.zero_stage}, {config.precision}, {world.world_size} "
            f"rank{'s' * (world.world_size > 1)}, batch "
            f"{batch.micro_batch} x {batch.accumulation} x {world.world_size} = {batch.global_batch} "
            f"sequences of {plan.model.seq_len}",
            *data_lines(plan.corpora, plan.total_steps * batch.global_batch),
            f"run folder {plan.run_dir}, step {state.step} of {plan.total_steps}",
            *_where_curves_are(config.config["tensorboard"]),
        ]:
            log.message(line)
        loop = _loop(engine, plan, batch, state, device, log, stop or StopRequests())
        try:
            yield loop
        finally:
            loop.batches.close()


def _where_curves_are(tensorboard: dict) -> list[str]:
    if not tensorboard.get("enabled"):
        return []
    return [f"curves: tensorboard --logdir {Path(tensorboard['output_path'], tensorboard['job_name'])}"]


def _open_log(plan: Plan, description: dict, engine, start_step: int, world: dist.World) -> RunLog:
    """The log, on rank 0 with run.json and the tokenizer beside it: the run folder alone is enough to go on from."""
    if dist.is_main():
        restarts.begin(plan.run_dir, start_step, plan.settings.restart_limit)
        tokenizer = Path(f"{plan.corpora.parts[0].prefix}.tokenizer.json")
        report.write_run(
            plan.run_dir, description, start_step=start_step, world_size=world.world_size, tokenizer=tokenizer
        )
    return RunLog(
        plan.run_dir,
        total_steps=plan.total_steps,
        is_main=dist.is_main(),
        monitor=engine.monitor,
        start_step=start_step,
    )


def _loop(engine, plan: Plan, batch: BatchPlan, state, device: torch.device, log: RunLog, stop) -> Loop:
    settings = plan.settings
    peak = None
    if device.type == "cuda":
        peak = hardware.peak_flops(torch.cuda.get_device_name(device), plan.config.precision)
    rewinder = rewind.Rewinder(
        plan.run_dir, plan.root, settings.rewind_limit, lambda folder: resume.load(engine, folder, plan)
    )
    return Loop(
        engine,
        plan.config,
        make_batches=lambda state: MicroBatches(
            plan.corpora.train, batch, state.samples, device, rewind.left_out(state.rewinds)
        ),
        plan=batch,
        schedule=plan.schedule,
        base_rates=[plan.optimiser["lr"]] * len(engine.optimizer.param_groups),
        intervals=Intervals(
            plan.total_steps,
            settings.log_interval,
            settings.eval_interval,
            settings.save_interval,
            settings.keep_last,
            compare_ranks=settings.compare_ranks_interval,
            zeroshot=settings.zeroshot_interval,
            keep_weights=settings.keep_weights_interval,
        ),
        state=state,
        root=plan.root,
        checkpoint_bytes=_checkpoint_bytes(plan),
        evaluate=_evaluator(engine, plan, batch, device),
        log=log,
        tokens_of=lambda _: batch.global_batch * plan.model.seq_len,
        flops_per_token=plan.model.flops_per_token(),
        peak_flops=peak,
        stop=stop,
        mirror=mirror.of(settings, log.message),
        async_save=settings.async_save,
        on_nan=settings.on_nan,
        spike_factor=settings.spike_factor,
        rewinder=rewinder if settings.on_nan == "rewind" else None,
        zeroshot=_asker(engine, plan, batch),
    )


def _evaluator(engine, plan: Plan, batch: BatchPlan, device: torch.device):
    """A function that measures every validation set with dropout off, and leaves the model in training mode."""
    steps = plan.settings.eval_steps
    limit = None if steps is None else steps * batch.global_batch

    def evaluate() -> dict[str, dict]:
        engine.eval()
        results = {
            name: perplexity.evaluate(
                engine.module,
                windows,
                batch_size=batch.micro_batch,
                rank=batch.rank,
                world_size=batch.world_size,
                max_windows=limit,
                device=device,
            )
            for name, windows in plan.corpora.valid.items()
        }
        engine.train()
        return results

    return evaluate


def _asker(engine, plan: Plan, batch: BatchPlan):
    """A function that asks the tasks of --zeroshot_interval and leaves the model in training mode; None without any."""
    if plan.zeroshot is None:
        return None

    def ask() -> dict[str, dict]:
        engine.eval()
        place = {"rank": batch.rank, "world_size": batch.world_size}
        results = plan.zeroshot.run(engine.module, batch_size=batch.micro_batch, **place)
        engine.train()
        return results

    return ask


def _build_optimizer(model, plan: Plan, device: torch.device):
    settings, config = plan.optimiser, plan.config
    groups = optim.parameter_groups(
        model.named_parameters(), decays, lr=settings["lr"], weight_decay=settings["weight_decay"]
    )
    offloaded = config.offload_optimizer is not None
    return optim.build_optimizer(
        settings["optimizer"],
        groups,
        betas=settings["betas"],
        eps=settings["eps"],
        guarded=deepspeed_engine.is_unsharded_fp32(config),
        clip=config.gradient_clipping,
        compiled=lambda: deepspeed_engine.agreed(deepspeed_engine.adam_class(device, offloaded)),
    )


def _load_weights(model: GPT, plan: Plan, ops: Ops) -> None:
    """Start from --init_from's weights. Rank 0 reads them; the others get them as they get a fresh model's."""
    weights = dist.everywhere(lambda: _read_weights(plan, ops) if dist.is_main() else {})
    for name, parameter in model.named_parameters():
        with deepspeed_engine.full_parameters([parameter], plan.config, modify=True):
            if dist.is_main():
                with torch.no_grad():
                    parameter.copy_(weights[name])


def _read_weights(plan: Plan, ops: Ops) -> dict[str, torch.Tensor]:
    """The weights of --init_from. Raises CheckpointError where they are not those of the plan's model."""
    weights, _ = read_weights(plan.init_weights)
    with torch.device("meta"):
        expected = GPT(plan.model, ops)
    for name, parameter in expected.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            found = f"one of shape {tuple(weights[name].shape)}" if name in weights else "none"
            raise CheckpointError(
                f"{plan.init_weights} does not hold the weights of the model it describes: {name} should have the "
                f"shape {tuple(parameter.shape)} and there is {found}; use a file that MegaGPT wrote"
            )
    return weights
