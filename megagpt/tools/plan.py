"""``megagpt plan``: memory, traffic and time of a run before a cluster is booked; no torch, in under a second."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megagpt.config.flags import parse_flags
from megagpt.config.presets import MODELS, model_preset, training_preset
from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.tools import plan_output, plan_report
from megagpt.tools.plan_hardware import find_gpu
from megagpt.tools.plan_memory import MARGIN, RUNTIME
from megagpt.tools.plan_search import CHECKPOINTING, OFFLOADS, Job, Option, options, recommend, refuse
from megagpt.tools.plan_states import ELEMENT

_SHAPE = ("n_layer", "d_model", "n_head", "d_ff", "seq_len", "vocab_size")
_FIGURES = ("gpu_memory_gb", "gpu_tflops", "gpu_bandwidth_gbs", "link_gbs", "network_gbit", "host_gbs")
_SIGNAL = 300.0  # seconds before the limit that slurm/pretrain.sbatch has the ranks save and stop
_WORK_BETWEEN_SAVES = 1800.0  # seconds that a lost node may cost


@dataclass(frozen=True)
class PlanSettings:
    """Plan a run: megagpt plan --model 6.7b --nodes 8 --gpu h100-80gb --seq_len 2048 --tokens 300e9"""

    model: str  # gpt1, gpt2-small|medium|large|xl, 1.3b ... 175b or tiny
    gpu: str  # h100-80gb, a100-40gb, ...; of one that is not known the next flags tell the figures
    gpu_memory_gb: float | None = None  # its memory, in 10^9 bytes
    gpu_tflops: float | None = None  # its dense peak in the precision planned, in 10^12 FLOP/s
    gpu_bandwidth_gbs: float | None = None  # its memory's speed, in 10^9 bytes/s
    link_gbs: float | None = None  # between the GPUs of a node, one direction, in 10^9 bytes/s
    network_gbit: float | None = None  # of a node's adapters together, in 10^9 bits/s
    host_gbs: float | None = None  # between GPU and CPU memory, one direction
    host_memory_gb: float | None = None  # CPU memory of a node; not checked unless given
    nodes: int = 1
    gpus_per_node: int = 8

    n_layer: int | None = None  # changes of the model's shape, as for train.py
    d_model: int | None = None
    n_head: int | None = None
    d_ff: int | None = None
    seq_len: int | None = None
    vocab_size: int | None = None
    dropout: float | None = None

    global_batch_size: int | None = None  # sequences an optimiser step; the preset's unless given
    tokens: float | None = None  # to train on, as in 300e9; the preset's where it has a number
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # bf16, or fp16 where the GPU has no bf16

    micro_batch_size: int | None = None  # look at this one alone; the next three likewise
    zero_stage: int | None = None
    offload: Literal["none", "optimizer", "all"] | None = None
    activation_checkpointing: int | None = None

    time: str = "24:00:00"  # limit of a job, as sbatch takes it
    start_minutes: float = 5.0  # from a job's start to its first step; assumed
    data: str = "data/corpus"  # for the command that is written, with the next one
    run_dir: str | None = None  # runs/MODEL unless given
    reserve_gb: float = RUNTIME / 1e9  # for CUDA, its kernels and NCCL
    margin: float = MARGIN  # of the rest, for what torch's allocator cannot reuse
    output: str = "plan"  # the folder that takes the DeepSpeed file and the command
    measure: bool = False  # run a few steps of a shallow model on this machine's GPUs and correct the estimate
    explain: bool = False  # the formula of every number
    json: bool = False  # everything as one JSON object; nothing is written

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "global_batch_size", "micro_batch_size", "tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < math.inf:
                raise ConfigError(f"--{name} {value:g} must be at least 1")
        for name in (*_FIGURES, "host_memory_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} {value:g} must be above 0")
        if self.zero_stage not in (None, *OFFLOADS):
            raise ConfigError(f"--zero_stage {self.zero_stage} must be 0, 1, 2 or 3")
        if not 0 <= self.margin < 1 or not 0 <= self.reserve_gb < math.inf or not 0 <= self.start_minutes < math.inf:
            raise ConfigError("--margin is a share from 0 to 1; --reserve_gb and --start_minutes are at least 0")


@dataclass(frozen=True)
class Plan:
    """A run as planned."""

    settings: PlanSettings
    job: Job
    found: list[Option]
    best: Option
    steps: int
    job_seconds: float  # of computing that one job of Slurm's has time for

    @property
    def seconds(self) -> float:
        return self.steps * self.best.time.total

    @property
    def requeues(self) -> int:
        return max(0, math.ceil(self.seconds / self.job_seconds) - 1)

    @property
    def save_interval(self) -> int:
        """Steps between checkpoints, a round number of about half an hour's; all steps of a shorter run."""
        steps = max(1.0, _WORK_BETWEEN_SAVES / self.best.time.total)
        unit = 10 ** max(0, int(math.log10(steps)) - 1)
        return min(self.steps, max(1, round(steps / unit) * unit))

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: weights in their dtype, and with them the float32 copy and both moments."""
        master = 0 if self.job.precision == "fp32" and self.best.layout.stage == 0 else 4
        return self.job.config.n_params() * (ELEMENT[self.job.precision] + master + 8)


def plan_main(argv: Sequence[str] | None = None) -> int:
    """Run ``megagpt plan``; its exit code."""
    settings = parse_flags(PlanSettings, argv, prog="megagpt plan")
    settings = replace(settings, run_dir=settings.run_dir or f"runs/{settings.model}")
    plan = make_plan(settings)
    measured = None
    if settings.measure:
        from megagpt.tools.plan_measure import measure

        measured = measure(plan)
        plan = make_plan(settings, measured.correction)
    if settings.json:
        sys.stdout.write(plan_report.as_json(plan, measured))
        return 0
    folder = Path(settings.output)
    flags = plan_output.train_flags(plan.best, settings, folder / plan_output.CONFIG, plan.steps, plan.save_interval)
    words = plan_output.command(plan.job, settings, flags)
    written = plan_output.write(folder, plan.best, words)
    for line in plan_report.lines(plan, measured, words, written):
        print(line)
    return 0


def make_plan(settings: PlanSettings, correction: float = 1.0) -> Plan:
    """The plan. Raises ConfigError for what cannot be, an impossible batch, and a model that fits under no option."""
    job = _job(settings, correction)
    chosen = {
        "stages": tuple(OFFLOADS) if settings.zero_stage is None else (settings.zero_stage,),
        "offloads": ("none", "optimizer", "all") if settings.offload is None else (settings.offload,),
        "checkpointing": CHECKPOINTING
        if settings.activation_checkpointing is None
        else (settings.activation_checkpointing,),
    }
    found = options(job, **chosen, micro_batch=settings.micro_batch_size)
    if not found:
        raise ConfigError(
            f"--zero_stage {settings.zero_stage} has no --offload {settings.offload}: stage 2 offloads the optimizer, "
            "stage 3 all states"
        )
    best = recommend(found)
    if best is None:
        shapes = {name: GPTConfig(**MODELS[name]) for name in MODELS if name not in ("lstm", settings.model)}
        raise refuse(job, found, shapes, **chosen)
    tokens = settings.tokens or training_preset(settings.model).get("max_tokens")
    if tokens is None:
        raise ConfigError(f"how long to train {settings.model} is not published in tokens; give --tokens, as in 10e9")
    a_step = job.global_batch * job.config.seq_len
    if tokens < a_step:
        raise ConfigError(
            f"--tokens {tokens:,.0f} is less than one step of {job.global_batch} x {job.config.seq_len} = {a_step:,} "
            "tokens; train longer or lower --global_batch_size"
        )
    limit = wall_seconds(settings.time) - _SIGNAL - 60 * settings.start_minutes
    if limit <= 0:
        raise ConfigError(
            f"--time {settings.time} leaves no time to train: {settings.start_minutes:g} minutes pass before the first "
            "step and the ranks save 5 before the end; ask for more"
        )
    return Plan(settings, job, found, best, int(tokens) // a_step, limit)


def _job(settings: PlanSettings, correction: float) -> Job:
    shape = model_preset(settings.model)
    given = {name: getattr(settings, name) for name in _SHAPE if getattr(settings, name) is not None}
    if "d_model" in given:
        given.setdefault("d_ff", 4 * given["d_model"])
    shape.update(given)
    if settings.dropout is not None:
        shape.update(dict.fromkeys(("embd_dropout", "attn_dropout", "resid_dropout"), settings.dropout))
    gpu = find_gpu(settings.gpu, **{name: getattr(settings, name) for name in _FIGURES})
    if settings.nodes > 1 and gpu.network is None:
        raise ConfigError(
            f"--nodes {settings.nodes} with --gpu {settings.gpu}: how fast a node's network is differs from cluster to "
            "cluster; give --network_gbit, of all adapters of a node together"
        )
    precision = settings.precision or ("bf16" if gpu.bf16 else "fp16")
    if precision == "bf16" and not gpu.bf16:
        raise ConfigError(
            f"--gpu {settings.gpu} has no bf16: its compute capability is below 8.0; use --precision fp16"
        )
    return Job(
        GPTConfig(**shape),
        gpu,
        settings.nodes,
        settings.gpus_per_node,
        settings.global_batch_size or training_preset(settings.model)["global_batch_size"],
        precision,
        runtime=settings.reserve_gb * 1e9,
        margin=settings.margin,
        host_memory=None if settings.host_memory_gb is None else settings.host_memory_gb * 1e9,
        correction=correction,
    )


def wall_seconds(text: str) -> float:
    """Seconds of a limit as sbatch takes it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises ConfigError."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--time {text[:40]!r} is no limit of sbatch's; give it as in 24:00:00 or 2-12:00:00")
    days, *rest = match.groups()
    numbers = [int(number or 0) for number in rest]
    if days is not None or match.group(4) is not None:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, numbers[:2]
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
