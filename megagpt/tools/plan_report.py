"""What ``megagpt plan`` says: the screen, and everything as JSON."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict

from megagpt.tools.plan_hardware import LATENCY, LINK_SHARE, MEMORY_SHARE, NETWORK_LATENCY, bus_bandwidth
from megagpt.tools.plan_memory import Memory
from megagpt.tools.plan_search import Option, fitting_batches

_KEPT = 4  # checkpoints: the best and the last three (--keep_last)
_COLUMNS = ("parameters", "gradients", "optimizer", "activations", "working", "buffers")
_PHASES = {"micro_step": "in every micro-step", "boundary": "behind the backward pass", "step": "at the update"}


def lines(plan, measured, words: list[str], written) -> Iterator[str]:
    """The screen. ``measured`` is plan_measure's result or None, ``words`` the command, ``written`` its files."""
    job, best = plan.job, plan.best
    P = job.config.n_params()
    yield (
        f"{plan.settings.model}: {P:,} parameters, sequences of {job.config.seq_len}, {job.global_batch} a step, on "
        f"{job.nodes} x {job.gpus_per_node} {plan.settings.gpu} ({job.gpu.memory / 1e9:.0f} GB) in {job.precision}"
    )
    if measured is not None:
        yield from measured.lines()
    yield ""
    yield from table(plan.found, best)
    yield ""
    yield f"recommended: {best.name}, micro-batch {best.layout.micro_batch} x accumulation {best.layout.accumulation}"
    pairs = [f"{micro}x{accumulation}" for micro, accumulation in fitting_batches(job, best)]
    yield f"  legal pairs that fit      {' '.join(pairs)}"
    yield from _memory_lines(best.memory, job.gpu.memory, job.gpus_per_node, job.host_memory)
    yield from _traffic_lines(plan)
    yield from _time_lines(plan)
    yield ""
    yield f"  DeepSpeed file            {written[0]}"
    yield f"  command                   {written[1]}: {shlex.join(words)}"
    if plan.settings.explain:
        yield ""
        yield from explanation(plan)


def table(found: list[Option], best: Option) -> Iterator[str]:
    """A line for each option: GB on a GPU by what they hold, then time; + fits, * is recommended."""
    width = max(len(option.name) for option in found)
    heads = ("params", "grads", "optim", "activ", "work", "buffers", "update", "peak")
    yield f"  {'GB on a GPU':<{width}}  micro x acc {' '.join(f'{head:>7}' for head in heads)}  s/step  MFU"
    for option in found:
        memory = option.memory
        values = [*(getattr(memory, name) for name in _COLUMNS), memory.update, memory.peak]
        mark = "*" if option is best else "+" if option.fits else "-"
        batch = f"{option.layout.micro_batch} x {option.layout.accumulation}"
        speed = f"{option.time.total:7.2f}  {100 * option.mfu:3.0f}%" if option.fits else "  does not fit"
        yield (
            f"{mark} {option.name:<{width}}  {batch:<11} {' '.join(f'{value / 1e9:7.1f}' for value in values)} {speed}"
        )


def _memory_lines(memory: Memory, gpu: float, gpus_per_node: int, host: float | None) -> Iterator[str]:
    for name in ("parameters", "gradients", "optimizer"):
        yield f"  {name:<26}{getattr(memory, name) / 1e9:8.2f} GB"
    backward = memory.activations + memory.working + memory.buffers
    yield (
        f"  {'backward pass':<26}{backward / 1e9:8.2f} GB: activations {memory.activations / 1e9:.2f}, on their way "
        f"{memory.working / 1e9:.2f}, buckets {memory.buffers / 1e9:.2f}"
    )
    yield f"  {'or update':<26}{memory.update / 1e9:8.2f} GB"
    yield f"  {'CUDA, NCCL and margin':<26}{(memory.runtime + memory.margin) / 1e9:8.2f} GB"
    yield f"  {'peak':<26}{memory.peak / 1e9:8.2f} GB of {gpu / 1e9:.0f}"
    if memory.host:
        there = "not compared with what there is: --host_memory_gb" if host is None else f"of {host / 1e9:,.0f}"
        yield f"  {'CPU memory of a node':<26}{memory.host * gpus_per_node / 1e9:8.2f} GB, pinned; {there}"


def _traffic_lines(plan) -> Iterator[str]:
    job, N = plan.job, plan.job.world_size
    if not plan.best.traffic:
        yield "  network                   nothing: one rank"
        return
    sent = sum(collective.sent(N) for collective in plan.best.traffic)
    for c in plan.best.traffic:
        kind = c.kind.replace("_", "-")
        yield f"  {kind:<26}{c.nbytes / 1e9:8.2f} GB a step in {c.calls} call{'s' * (c.calls != 1)}, {_PHASES[c.phase]}"
    yield f"  {'sent by each GPU':<26}{sent / 1e9:8.2f} GB a step over its link within the node"
    if job.nodes > 1:
        yield (
            f"  {'sent by each node':<26}{sent / 1e9:8.2f} GB a step over its adapters, "
            f"{sent / 1e9 / job.gpus_per_node:.2f} over each of {job.gpus_per_node}"
        )


def _time_lines(plan) -> Iterator[str]:
    time, job = plan.best.time, plan.job
    tokens = job.global_batch * job.config.seq_len
    yield (
        f"  {'step':<26}{time.total:8.3f} s: products {time.products:.3f}, attention {time.attention:.3f}, "
        f"element-wise {time.elementwise:.3f}, update {time.update:.3f}, CPU memory {time.transfers:.3f}, "
        f"network {time.exposed:.3f} (and {time.network - time.exposed:.3f} hidden)"
    )
    rate = tokens / time.total
    yield f"  {'speed':<26}{rate:8,.0f} tokens/s, {rate / job.world_size:,.0f} a GPU, MFU {100 * plan.best.mfu:.0f}%"
    length, unit = (plan.seconds / 86400, "days") if plan.seconds >= 86400 else (plan.seconds / 3600, "hours")
    yield f"  {'run':<26}{length:8.2f} {unit}: {plan.steps:,} steps, {plan.steps * tokens:,} tokens"
    yield f"  {'jobs':<26}{plan.requeues + 1:8} of {plan.settings.time}, {plan.requeues} requeued"
    size = plan.checkpoint_bytes / 1e9
    every = "step" if plan.save_interval == 1 else f"{plan.save_interval} steps"
    yield (
        f"  {'checkpoint':<26}{size:8.2f} GB, every {every}; disk {(_KEPT + 1) * size:,.0f} GB "
        f"for the {_KEPT} that are kept and the one being written"
    )


def explanation(plan) -> Iterator[str]:
    """The formula of every number with this plan's values."""
    job, layout = plan.job, plan.best.layout
    gpu = job.gpu
    latency = LATENCY if job.nodes == 1 else NETWORK_LATENCY
    bandwidth = bus_bandwidth(gpu, job.nodes) / 1e9
    told = {
        "parameters, optimizer": "ZeRO's layout with padding, exact",
        "activations": "(8 d + 2 f) e + 4 heads (12 with dropout) + 16 bytes a token and block",
        "micro-batch": f"divides {job.global_batch} sequences / {job.world_size} ranks",
        "products": f"6 (L (4 d^2 + 2 d f) + V d) FLOPs a token at {gpu.product_share:.2f} of the peak",
        "attention": "7 L T d FLOPs a token at the share of the peak that FlashAttention-2 reaches on an H100",
        "element-wise, update": f"82 d L + 6 V bytes a token, 54 a parameter, at {MEMORY_SHARE} of the memory's speed",
        "network": f"{1e6 * latency:.0f} us a call + bytes / {bandwidth:.0f} GB/s ({LINK_SHARE} of the slower link)",
        "hidden": "the micro-steps' collectives, as far as computation lasts" if layout.overlap else "no collective",
        "correction": f"x {job.correction:.3f} of the computation{' (not measured)' if job.correction == 1 else ''}",
    }
    yield "how it was computed (docs/plan.md has the sources, and what is not modelled)"
    yield from (f"  {name:<26}{text}" for name, text in told.items())


def as_json(plan, measured) -> str:
    """The whole plan as one JSON object."""
    job = plan.job

    def option(o: Option) -> dict:
        return {
            "name": o.name,
            "zero_stage": o.layout.stage,
            "offload": o.layout.offload,
            "activation_checkpointing": o.checkpointing,
            "micro_batch_size": o.layout.micro_batch,
            "gradient_accumulation_steps": o.layout.accumulation,
            "fits": o.fits,
            "memory": {**asdict(o.memory), "peak": o.memory.peak},
            "seconds": {**asdict(o.time), "total": o.time.total},
            "collectives": [c._asdict() for c in o.traffic],
            "mfu": o.mfu,
        }

    value = {
        "n_params": job.config.n_params(),
        "model": job.config.to_dict(),
        "gpu": asdict(job.gpu),
        "world_size": job.world_size,
        "global_batch_size": job.global_batch,
        "precision": job.precision,
        "correction": job.correction,
        "measured": None if measured is None else asdict(measured),
        "options": [option(o) for o in plan.found],
        "recommended": option(plan.best),
        "steps": plan.steps,
        "seconds": plan.seconds,
        "requeues": plan.requeues,
        "save_interval": plan.save_interval,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "disk_bytes": (_KEPT + 1) * plan.checkpoint_bytes,
    }
    return json.dumps(value, indent=1) + "\n"
