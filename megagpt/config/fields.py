"""The flags of ``train.py``: one frozen dataclass, a line of help for each, checked on construction.

Batch, precision, clipping and ZeRO belong to the DeepSpeed file; their flags here fill its "auto" values.
A number left at None is decided by that file or by the model's preset.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.config import shared
from megagpt.config.flags import parse_flags
from megagpt.config.shared import BELOW_ONE, MOST, MOST_FLOAT, BatchFlags, NeededFlags, OptimiserFlags, RunFlags
from megagpt.errors import ConfigError


@dataclass(frozen=True)
class _PretrainFlags(NeededFlags):
    """What only ``train.py`` knows."""

    data: tuple[str, ...]  # prefix of a prepared corpus, or a blend: 0.7 PREFIX 0.3 PREFIX

    # the model
    model: str | None = None  # gpt1, gpt2-small|medium|large|xl, 1.3b ... 175b, tiny, lstm (gpt1, or --init_from's)
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
    init_from: str | None = None  # start from the weights of a run, a checkpoint, a .safetensors file or an import

    # the data
    valid_data: tuple[str, ...] = ()  # validation sets, NAME=PREFIX each
    sampler: Literal["random", "epoch"] = "epoch"  # windows at random starts, or each window once an epoch

    # how long
    max_steps: int | None = None  # optimiser steps
    max_tokens: int | None = None  # ... or tokens to train on; 1.3b ... 175b take 300 billion where no length is given
    epochs: float | None = None  # ... or passes over the corpus; gpt1 makes 100 where no length is given

    # the learning rate
    lr: float | None = None  # highest learning rate
    min_lr: float | None = None  # learning rate at the end of the schedule
    warmup_steps: int | None = None  # steps of linear warm-up
    schedule: str | None = None  # warmup_cosine, warmup_linear, warmup_constant, warmup_cosine_reference or stlr

    # evaluation
    eval_interval: int = 1000  # steps between evaluations; 0 only at the start and at the end
    eval_steps: int | None = None  # global batches of an evaluation; the whole validation set by default
    zeroshot_interval: int = 0  # ask tasks without training after this many steps, and 2, 4, 8, ... times it; 0 never
    zeroshot_data: str | None = None  # folder with the files of those tasks
    zeroshot_tasks: tuple[str, ...] = ()  # cola, sst2, race, winograd, pdp60, copa; all with files by default
    zeroshot_limit: int | None = None  # questions of each of them, evenly spread over it; all by default


@dataclass(frozen=True)
class TrainSettings(RunFlags, BatchFlags, OptimiserFlags, _PretrainFlags):
    """Pre-train a GPT: deepspeed train.py --ds_config ds_configs/cpu.json --data PREFIX --run_dir runs/NAME"""

    on_nan: Literal["skip", "rewind", "stop"] = "skip"  # skip an update that is not finite, go back before it, or stop
    rewind_limit: int = 5  # how often a run may go back to a checkpoint
    keep_weights_interval: int = 0  # steps between checkpoints whose weights stay in RUN_DIR/weights; 0 none

    def __post_init__(self) -> None:
        problems = [*self._number_problems(), *self._text_problems()]
        if problems:
            raise ConfigError("; ".join(problems))

    def _number_problems(self):
        yield from shared.number_problems(self, _RANGES)
        lengths = [name for name in ("max_steps", "max_tokens", "epochs") if getattr(self, name) is not None]
        if len(lengths) > 1:
            yield f"--{' and --'.join(lengths)} both say how long to train; give one"
        if self.lr is not None and self.min_lr is not None and self.min_lr > self.lr:
            yield f"--min_lr {self.min_lr:g} is above --lr {self.lr:g}"
        if self.keep_weights_interval and (not self.save_interval or self.keep_weights_interval % self.save_interval):
            yield f"--keep_weights_interval {self.keep_weights_interval} is no multiple of --save_interval"
        if self.zeroshot_interval and self.zeroshot_data is None:
            yield "--zeroshot_interval needs --zeroshot_data DIR, the folder with the tasks' files"
        for name in ("zeroshot_data", "zeroshot_tasks", "zeroshot_limit"):
            if getattr(self, name) and not self.zeroshot_interval:
                yield f"--{name} needs --zeroshot_interval N, the steps until the tasks are asked first"

    def _text_problems(self):
        yield from shared.text_problems(self)
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


_RANGES = {
    **shared.RANGES,
    **dict.fromkeys(("n_layer", "d_model", "n_head", "d_ff", "seq_len", "vocab_size"), (1, MOST, False)),
    **dict.fromkeys(("max_steps", "max_tokens", "eval_steps", "zeroshot_limit"), (1, MOST, False)),
    **dict.fromkeys(
        ("warmup_steps", "eval_interval", "rewind_limit", "zeroshot_interval", "keep_weights_interval"),
        (0, MOST, False),
    ),
    **dict.fromkeys(("dropout", "embd_dropout", "attn_dropout", "resid_dropout"), (0.0, BELOW_ONE, False)),
    **dict.fromkeys(("lr", "epochs"), (0.0, MOST_FLOAT, True)),
    "min_lr": (0.0, MOST_FLOAT, False),
}


def _weight(word: str) -> float | None:
    """A positive finite number, or None."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


# Megatron-LM's names of what is the same thing here, so that its users' commands need less change.
_MEGATRON = {
    "num_layers": "n_layer",
    "hidden_size": "d_model",
    "num_attention_heads": "n_head",
    "ffn_hidden_size": "d_ff",
    "seq_length": "seq_len",
    "attention_dropout": "attn_dropout",
    "data_path": "data",
    "train_iters": "max_steps",
    "eval_iters": "eval_steps",
    "lr_warmup_iters": "warmup_steps",
    "adam_eps": "eps",
    "bf16": "precision",
    "fp16": "precision",
}
# ... and what serves in the place of those that are something else here.
_ELSEWHERE = {
    "clip_grad": "gradient_clipping in the DeepSpeed file",
    "hidden_dropout": "--resid_dropout and --embd_dropout",
    "initial_loss_scale": "fp16.initial_scale_power in the DeepSpeed file",
    "load": "a run goes on from its own --run_dir; --init_from takes the weights of another one",
    "lr_decay_style": "--schedule",
    "max_position_embeddings": "--seq_len",
    "pipeline_model_parallel_size": "ZeRO-3 splits large models",
    "recompute_granularity": "--activation_checkpointing",
    "save": "--run_dir",
    "split": "megagpt prepare --valid_fraction, and --valid_data NAME=PREFIX",
    "tensor_model_parallel_size": "ZeRO-3 splits large models",
    "tensorboard_dir": "RUN_DIR/tb",
    "tokenizer_type": "the corpus brings its tokenizer",
    "train_samples": "--max_steps or --max_tokens",
    "valid_data_path": "--valid_data NAME=PREFIX",
    "vocab_file": "the corpus brings its tokenizer",
}
ALIASES = {**shared.ALIASES, **_MEGATRON}
_BARE = {**shared.BARE, "bf16": "bf16", "fp16": "fp16"}


def parse(argv: Sequence[str] | None = None) -> TrainSettings:
    """The settings of ``train.py`` from its flags. Raises ConfigError in one line; ``--help`` prints and exits."""
    return parse_flags(TrainSettings, argv, prog="train.py", aliases=ALIASES, bare=_BARE, elsewhere=_ELSEWHERE)
