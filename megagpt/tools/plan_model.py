"""A model by arithmetic: its parameters one by one, in the order in which DeepSpeed sees them. No torch."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model."""

    name: str
    numel: int

    @property
    def decays(self) -> bool:
        """Whether the optimiser's group that decays has it: every matrix, and no bias or LayerNorm gain."""
        return self.name.rpartition(".")[2].startswith("weight") and ".ln_" not in f".{self.name}"


@functools.lru_cache(maxsize=64)
def parameters(config: GPTConfig) -> tuple[Parameter, ...]:
    """Every parameter in the order of ``GPT.named_parameters``. Raises ConfigError for an LSTM."""
    if config.backbone != "transformer":
        raise ConfigError(
            "plan knows transformers; an LSTM's memory and time follow other rules. Choose another --model"
        )
    return tuple(_parameters(config))


def _parameters(config: GPTConfig) -> Iterator[Parameter]:
    d, f = config.d_model, config.d_ff
    yield Parameter("wte.weight", config.vocab_size * d)
    yield Parameter("wpe.weight", config.seq_len * d)
    parts = {
        "ln_1": _norm(d),
        "ln_2": _norm(d),
        "attn": [*_linear("qkv.", d, 3 * d), *_linear("proj.", d, d)],
        "mlp": [*_linear("fc.", d, f), *_linear("proj.", f, d)],
    }
    order = ("ln_1", "attn", "ln_2", "mlp") if config.norm == "pre" else ("attn", "ln_1", "mlp", "ln_2")
    for i in range(config.n_layer):
        for part in order:
            for name, numel in parts[part]:
                yield Parameter(f"blocks.{i}.{part}.{name}", numel)
    if config.norm == "pre":
        for name, numel in _norm(d):
            yield Parameter(f"ln_f.{name}", numel)


def _norm(d: int) -> list[tuple[str, int]]:
    return [("weight", d), ("bias", d)]


def _linear(prefix: str, n_in: int, n_out: int) -> list[tuple[str, int]]:
    return [(f"{prefix}weight", n_in * n_out), (f"{prefix}bias", n_out)]


@functools.lru_cache(maxsize=64)
def groups(config: GPTConfig) -> tuple[tuple[Parameter, ...], ...]:
    """The optimiser's two groups, the one that decays first, as ``optim.parameter_groups`` makes them."""
    every = parameters(config)
    return tuple(p for p in every if p.decays), tuple(p for p in every if not p.decays)
