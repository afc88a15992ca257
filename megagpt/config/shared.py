"""The flags that ``train.py`` and ``finetune.py`` have in common: a dataclass a group, and what is checked of them.

The settings of a script inherit these groups. A dataclass collects its fields from its last base to its first, so the
list of bases reads from the last group of ``--help`` to the first.
"""

import math
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

ALIASES = {"deepspeed_config": "ds_config", "deepspeed": "ds_config"}
# Flags that may stand alone, and what they then mean. "deepspeed" alone is the switch that DeepSpeed's own tutorials
# put before --deepspeed_config.
BARE = {"activation_checkpointing": "1", "preflight": "stop", "deepspeed": None}


@dataclass(frozen=True)
class NeededFlags:
    """What no run goes without."""

    ds_config: str  # DeepSpeed's JSON or HJSON file (also --deepspeed_config, --deepspeed)
    run_dir: str  # folder of this run: checkpoints, metrics.jsonl, TensorBoard, run.json, summary.md


@dataclass(frozen=True)
class OptimiserFlags:
    """The optimiser; the highest rate and its schedule are each script's own."""

    optimizer: Literal["adamw", "openai_adam", "apex"] | None = None  # adamw by default
    weight_decay: float | None = None  # decoupled, on matrices only (the preset's; fine-tuning: 0.01)
    betas: tuple[float, float] | None = None  # Adam's decay rates of the moments (preset's; fine-tuning: 0.9 0.999)
    eps: float | None = None  # Adam's epsilon (the preset's; fine-tuning: 1e-8)


@dataclass(frozen=True)
class BatchFlags:
    """What the DeepSpeed file leaves open, and how it is computed."""

    micro_batch_size: int | None = None  # sequences, or a task's examples, a rank and forward pass
    gradient_accumulation_steps: int | None = None  # forward passes an optimiser step
    global_batch_size: int | None = None  # the same an optimiser step over all ranks (fine-tuning: 32)
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # fp32 unless the DeepSpeed file says
    kernels: Literal["auto", "torch", "cpu", "triton"] = "auto"  # which operations; auto: the fastest that serve here
    activation_checkpointing: int = 0  # recompute every k-th block in the backward pass; 0 none, 1 all


@dataclass(frozen=True)
class RunFlags:
    """What happens when."""

    log_interval: int = 10  # steps between log lines
    save_interval: int = 1000  # steps between checkpoints; 0 only at the end
    keep_last: int = 3  # checkpoints kept beside the best one; never fewer than two, for one may turn out damaged
    seed: int = 1234  # of new weights, the order of the data and dropout
    deterministic: bool = False  # the same bits in every run on the same machines; slower on a GPU
    resume: str = "auto"  # auto: continue the run folder's run; never: refuse one; or the PATH of a checkpoint
    mirror: str | None = None  # a second folder to which each checkpoint is copied in the background
    async_save: bool = False  # write checkpoints in the background, from a copy in memory
    distributed_timeout_minutes: float = 10.0  # how long ranks wait for each other before the run ends
    preflight: Literal["no", "warn", "stop"] = "no"  # check and measure all hosts first; stop: on slow ones as well
    rendezvous_timeout: float = 120.0  # seconds in which all ranks have to come to the meeting point
    hang_timeout: float | None = None  # seconds without progress that end the run; 540, and 1800 in setup and saves
    compare_ranks_interval: int = 1000  # steps between checks that all ranks hold the same model; 0 never
    on_nan: Literal["skip", "stop"] = "skip"  # an update that is not finite: skip it, or stop at the first
    spike_factor: float | None = None  # treat a loss above so many times its running mean as not finite
    restart_limit: int | None = None  # starts from one step without a new checkpoint; 3 for requeued jobs, 0 any number
    exit_duration_in_mins: float | None = None  # save and stop this long after the start, with exit code 75
    exit_signal: str | None = None  # a signal beside USR1 and TERM on which the run saves and stops: USR2, HUP, ...


MOST, MOST_FLOAT = 2**63 - 1, 1e18
BELOW_ONE = math.nextafter(1.0, 0.0)
Range = tuple[float, float, bool]  # lowest, highest, whether the lowest itself is out
RANGES: dict[str, Range] = {
    **dict.fromkeys(("micro_batch_size", "gradient_accumulation_steps", "global_batch_size"), (1, MOST, False)),
    **dict.fromkeys(("log_interval", "keep_last"), (1, MOST, False)),
    **dict.fromkeys(("save_interval", "seed", "activation_checkpointing"), (0, MOST, False)),
    **dict.fromkeys(("compare_ranks_interval", "restart_limit"), (0, MOST, False)),
    "betas": (0.0, BELOW_ONE, False),
    "spike_factor": (1.0, MOST_FLOAT, True),
    "weight_decay": (0.0, MOST_FLOAT, False),
    **dict.fromkeys(("eps", "distributed_timeout_minutes", "rendezvous_timeout"), (0.0, MOST_FLOAT, True)),
    **dict.fromkeys(("exit_duration_in_mins", "hang_timeout"), (0.0, MOST_FLOAT, True)),
}


def number_problems(settings, ranges: Mapping[str, Range]) -> Iterator[str]:
    """A sentence for each flag of ``ranges`` whose number, or one of whose numbers, lies outside."""
    for name, (low, high, low_is_out) in ranges.items():
        value = getattr(settings, name)
        numbers = value if isinstance(value, tuple) else (value,)
        wrong = [n for n in numbers if n is not None and not (low < n <= high or (n == low and not low_is_out))]
        if wrong:
            shown = " ".join(f"{n:g}" if isinstance(n, float) else str(n) for n in numbers)[:80]
            above = f"{'above' if low_is_out else 'at least'} {low:g}"
            below = f" and below {math.ceil(high):g}" if high < 1 or wrong[0] > high else ""
            yield f"--{name} {shown} must be {above}{below}"


def text_problems(settings, *names: str) -> Iterator[str]:
    """A sentence for each flag with a text that cannot be meant; ``names`` are more flags that must not be empty."""
    for name in ("ds_config", *names, "run_dir", "resume", "mirror"):
        if getattr(settings, name) is not None and not getattr(settings, name).strip():
            yield f"--{name} is empty"
    if settings.resume.endswith(".safetensors"):
        yield f"--resume {settings.resume} has weights and no state to go on from; --init_from starts a new run from it"
    if settings.exit_signal is not None and stop_signal(settings.exit_signal) is None:
        yield f"--exit_signal {settings.exit_signal[:40]} is no signal to stop on; give USR2, HUP or another one"


# No process can catch KILL and STOP, Ctrl-C stops without saving, and the others tell of a fault in the program.
_STOP_SIGNALS = ("USR1", "USR2", "TERM", "HUP", "ALRM", "VTALRM", "PROF", "XCPU", "URG", "IO", "WINCH", "PWR", "QUIT")


def stop_signal(name: str) -> signal.Signals | None:
    """The signal ``name``, with SIG or without, on which a run is to stop; None where it cannot stop on that."""
    word = name.upper().removeprefix("SIG")
    return signal.Signals.__members__.get(f"SIG{word}") if word in _STOP_SIGNALS else None
