"""The flags of ``train.py``: one frozen dataclass, a line of help for each, checked on construction.

Batch, precision, clipping and ZeRO belong to the DeepSpeed file; their flags here fill its "auto" values.
A number left at None is decided by that file or by the model's preset.
"""

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError

ALIASES = {"deepspeed_config": "ds_config", "deepspeed": "ds_config"}


@dataclass(frozen=True)
class TrainSettings:
    """Pre-train a GPT: deepspeed train.py --ds_config ds_configs/cpu.json --data PREFIX --run_dir runs/NAME"""

    ds_config: str  # DeepSpeed's JSON or HJSON file (also --deepspeed_config, --deepspeed)
    data: tuple[str, ...]  # prefix of a prepared corpus, or a blend: 0.7 PREFIX 0.3 PREFIX
    run_dir: str  # folder of this run: checkpoints, metrics.jsonl, TensorBoard, run.json

    # the model
    model: str | None = (
        None  # gpt1, gpt2-small|medium|large|xl, 1.3b ... 175b, tiny or lstm (gpt1 unless --init_from says)
    )
    n_layer: int | None = None  # number of blocks
    d_model: int | None = None  # width
    n_head: int | None = None  # attention heads
    d_ff: int | None = None  # width of the feed-forward layer, 4 x d_model by default
    seq_len: int | None = None  # positions a sequence
    vocab_size: int | None = None  # rows of the embedding; at least the corpus's vocabulary
    dropout: float | None = None  # all three dropout rates at once
    embd_dropout: float | None = None  # dropout after the embeddings
    attn_dropout: float | None = None  # dropout on attention weights
    resid_dropout: float | None = None  # dropout before each residual sum
    embd_dropout_mode: Literal["sum", "matrix"] | None = None  # drop of the summed embeddings, or of the tables (GPT-1)
    init_from: str | None = None  # start from the weights of a run folder, a checkpoint or a .safetensors file
    kernels: Literal["auto", "torch", "cpu", "triton"] = "auto"  # which operations; auto: the fastest that serve here
    activation_checkpointing: int = 0  # recompute every k-th block in the backward pass; 0 none, 1 all

    # the data
    valid_data: tuple[str, ...] = ()  # validation sets, NAME=PREFIX each
    sampler: Literal["random", "epoch"] = "epoch"  # windows at random starts, or each window once an epoch

    # how long
    max_steps: int | None = None  # optimiser steps
    max_tokens: int | None = None  # ... or tokens to train on; 1.3b ... 175b take 300 billion where no length is given
    epochs: float | None = None  # ... or passes over the corpus; gpt1 makes 100 where no length is given

    # the optimiser
    optimizer: Literal["adamw", "openai_adam", "apex"] | None = None  # adamw by default
    lr: float | None = None  # highest learning rate
    min_lr: float | None = None  # learning rate at the end of the schedule
    warmup_steps: int | None = None  # steps of linear warm-up
    schedule: str | None = None  # warmup_cosine, warmup_linear, warmup_constant, warmup_cosine_reference or stlr
    weight_decay: float | None = None  # decoupled, on matrices only
    betas: tuple[float, float] | None = None  # Adam's decay rates of the two moments
    eps: float | None = None  # Adam's epsilon

    # what the DeepSpeed file leaves open
    micro_batch_size: int | None = None  # sequences a rank and forward pass
    gradient_accumulation_steps: int | None = None  # forward passes an optimiser step
    global_batch_size: int | None = None  # sequences an optimiser step over all ranks
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # fp32 unless the DeepSpeed file says

    # what happens when
    log_interval: int = 10  # steps between log lines
    eval_interval: int = 1000  # steps between evaluations; 0 only at the start and at the end
    eval_steps: int | None = None  # global batches of an evaluation; the whole validation set by default
    save_interval: int = 1000  # steps between checkpoints; 0 only at the end
    keep_last: int = 3  # checkpoints kept beside the best one
    seed: int = 1234  # of initialisation, data order and dropout
    resume: str = "auto"  # auto: continue the run folder's run; never: refuse one; or the PATH of a checkpoint
    mirror: str | None = None  # a second folder to which each checkpoint is copied in the background
    async_save: bool = False  # write checkpoints in the background, from a copy in memory
    distributed_timeout_minutes: float = 10.0  # how long ranks wait for each other before the run ends
    preflight: Literal["no", "warn", "stop"] = "no"  # check and measure all hosts first; stop: on slow ones as well
    rendezvous_timeout: float = 120.0  # seconds in which all ranks have to come to the meeting point
    hang_timeout: float | None = None  # seconds without progress that end the run; 540, and 1800 in setup and saves
    compare_ranks_interval: int = 1000  # steps between checks that all ranks hold the same model; 0 never
    restart_limit: int | None = None  # starts from one step without a new checkpoint; 3 for requeued jobs, 0 any number
    exit_duration_in_mins: float | None = None  # save and stop this long after the start, with exit code 75
    exit_signal: str | None = None  # a signal beside USR1 and TERM on which the run saves and stops: USR2, HUP, ...

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._text_problems()]
        if problems:
            raise ConfigError("; ".join(problems))

    def _number_problems(self):
        for name, (low, high, low_is_out) in _RANGES.items():
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else (value,)
            wrong = [n for n in numbers if n is not None and not (low < n <= high or (n == low and not low_is_out))]
            if wrong:
                above = f"{'above' if low_is_out else 'at least'} {low:g}"
                below = f" and below {math.ceil(high):g}" if high < 1 or wrong[0] > high else ""
                yield f"--{name} {' '.join(map(str, numbers))[:80]} must be {above}{below}"
        lengths = [name for name in ("max_steps", "max_tokens", "epochs") if getattr(self, name) is not None]
        if len(lengths) > 1:
            yield f"--{' and --'.join(lengths)} both say how long to train; give one"
        if self.lr is not None and self.min_lr is not None and self.min_lr > self.lr:
            yield f"--min_lr {self.min_lr:g} is above --lr {self.lr:g}"

    def _text_problems(self):
        for name in ("ds_config", "run_dir", "resume", "mirror"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                yield f"--{name} is empty"
        if self.resume.endswith(".safetensors"):
            yield f"--resume {self.resume} has weights and no state to go on from; --init_from starts a new run from it"
        if self.exit_signal is not None and stop_signal(self.exit_signal) is None:
            yield f"--exit_signal {self.exit_signal[:40]} is no signal to stop on; give USR2, HUP or another one"
        for check in (self.blend, self.valid_sets):
            try:
                check()
            except ConfigError as error:
                yield str(error)

    def blend(self) -> list[tuple[float, str]]:
        """The corpora of ``--data`` as (weight, prefix); a single one has weight 1."""
        if len(self.data) == 1:
            return [(1.0, self.data[0])]
        weights = [_weight(word) for word in self.data[::2]]
        if not self.data or len(self.data) % 2 or None in weights:
            raise ConfigError(
                f"--data {' '.join(self.data)!r} is neither one prefix nor pairs of a positive weight and a prefix, "
                "as in --data 0.7 data/books 0.3 data/code"
            )
        return list(zip(weights, self.data[1::2], strict=True))

    def valid_sets(self) -> dict[str, str]:
        """The validation sets of ``--valid_data``: {name: prefix}."""
        sets: dict[str, str] = {}
        for word in self.valid_data:
            name, equals, prefix = word.partition("=")
            if not (name and equals and prefix) or "/" in name:
                raise ConfigError(f"--valid_data {word!r} is not NAME=PREFIX, as in books=data/books-valid")
            if name in sets:
                raise ConfigError(f"--valid_data names two sets {name!r}; give each its own name")
            sets[name] = prefix
        return sets


_MOST = 2**63 - 1
_BELOW_ONE = math.nextafter(1.0, 0.0)
_RANGES = {  # (lowest, highest, whether the lowest itself is out)
    **dict.fromkeys(("n_layer", "d_model", "n_head", "d_ff", "seq_len", "vocab_size"), (1, _MOST, False)),
    **dict.fromkeys(("micro_batch_size", "gradient_accumulation_steps", "global_batch_size"), (1, _MOST, False)),
    **dict.fromkeys(("max_steps", "max_tokens", "eval_steps", "log_interval", "keep_last"), (1, _MOST, False)),
    **dict.fromkeys(("warmup_steps", "eval_interval", "save_interval", "seed"), (0, _MOST, False)),
    **dict.fromkeys(("compare_ranks_interval", "restart_limit"), (0, _MOST, False)),
    **dict.fromkeys(("dropout", "embd_dropout", "attn_dropout", "resid_dropout"), (0.0, _BELOW_ONE, False)),
    "activation_checkpointing": (0, _MOST, False),
    "betas": (0.0, _BELOW_ONE, False),
    **dict.fromkeys(("lr", "eps", "epochs", "distributed_timeout_minutes"), (0.0, 1e18, True)),
    **dict.fromkeys(("exit_duration_in_mins", "hang_timeout", "rendezvous_timeout"), (0.0, 1e18, True)),
    **dict.fromkeys(("min_lr", "weight_decay"), (0.0, 1e18, False)),
}


def stop_signal(name: str) -> signal.Signals | None:
    """The signal ``name``, with SIG or without, on which a run is to stop; None where it cannot stop on that."""
    word = name.upper().removeprefix("SIG")
    return signal.Signals.__members__.get(f"SIG{word}") if word in _STOP_SIGNALS else None


# No process can catch KILL and STOP, Ctrl-C stops without saving, and the others tell of a fault in the program.
_STOP_SIGNALS = ("USR1", "USR2", "TERM", "HUP", "ALRM", "VTALRM", "PROF", "XCPU", "URG", "IO", "WINCH", "PWR", "QUIT")


def _weight(word: str) -> float | None:
    """A positive finite number, or None."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def parse(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of ``train.py`` from its flags. Raises ConfigError in one line; ``--help`` prints and exits."""
    # "deepspeed" alone is the switch that DeepSpeed's own tutorials put before --deepspeed_config.
    bare = {"activation_checkpointing": "1", "preflight": "stop", "deepspeed": None}
    return parse_flags(TrainSettings, argv, prog="train.py", aliases=ALIASES, bare=bare)
