"""Weights under the names and in the layout of transformers' GPT2LMHeadModel and OpenAIGPTLMHeadModel.

transformers keeps a projection as (in, out), the transpose of ``nn.Linear``'s (out, in); its order of q, k and v and
everything else is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megagpt.errors import CheckpointError
from megagpt.model.config import GPTConfig

_PREFIX = "transformer."  # absent where the weights were saved without the output projection
_TABLES = {"pre": ("wte", "wpe"), "post": ("tokens_embed", "positions_embed")}
_PROJECTIONS = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
_HEAD = "lm_head.weight"
_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that files of older versions hold


@dataclass(frozen=True)
class _Entry:
    """One parameter: its name and shape here, its name there and whether it is transposed there."""

    ours: str
    shape: tuple[int, ...]
    theirs: str
    transposed: bool = False

    @property
    def shape_there(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape


def to_transformers(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """``GPT``'s state dict as that of GPT2LMHeadModel (pre-norm) or OpenAIGPTLMHeadModel (post-norm).

    Transposed tensors are copies. The output projection is the token embedding itself, under both names. Raises
    CheckpointError unless ``weights`` are exactly the parameters of such a model.
    """
    _refuse_recurrent(config)
    entries = list(_entries(config))
    _check(weights, {entry.ours: entry.shape for entry in entries}, config)
    converted = {_PREFIX + entry.theirs: _turned(weights[entry.ours], entry) for entry in entries}
    return {**converted, _HEAD: weights["wte.weight"]}


def from_transformers(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """``GPT``'s state dict from that of GPT2LMHeadModel, OpenAIGPTLMHeadModel or the model inside either.

    Transposed tensors are copies. Raises CheckpointError unless ``weights`` are exactly the parameters of such a model
    (causal masks, and the output projection where it is the token embedding, may be there too).
    """
    _refuse_recurrent(config)
    weights = {name.removeprefix(_PREFIX): x for name, x in weights.items() if not name.endswith(_CAUSAL_MASKS)}
    head = weights.pop(_HEAD, None)
    entries = list(_entries(config))
    _check(weights, {entry.theirs: entry.shape_there for entry in entries}, config)
    if head is not None and not head.equal(weights[entries[0].theirs]):
        raise CheckpointError(f"{_HEAD} differs from {entries[0].theirs}: only models that share the two can be read")
    return {entry.ours: _turned(weights[entry.theirs], entry) for entry in entries}


def _refuse_recurrent(config: GPTConfig) -> None:
    if config.backbone != "transformer":
        raise CheckpointError(f"transformers has no model like this one, whose backbone is an {config.backbone}")


def _entries(config: GPTConfig) -> Iterator[_Entry]:
    d, f = config.d_model, config.d_ff
    tokens, positions = _TABLES[config.norm]
    yield _Entry("wte.weight", (config.vocab_size, d), f"{tokens}.weight")
    yield _Entry("wpe.weight", (config.seq_len, d), f"{positions}.weight")
    shapes = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc": (f, d), "mlp.proj": (d, f)}
    for i in range(config.n_layer):
        for name, theirs in _PROJECTIONS.items():
            yield _Entry(f"blocks.{i}.{name}.weight", shapes[name], f"h.{i}.{theirs}.weight", transposed=True)
            yield _Entry(f"blocks.{i}.{name}.bias", shapes[name][:1], f"h.{i}.{theirs}.bias")
        for norm in ("ln_1", "ln_2"):
            yield from (_Entry(f"blocks.{i}.{norm}.{x}", (d,), f"h.{i}.{norm}.{x}") for x in ("weight", "bias"))
    if config.norm == "pre":
        yield from (_Entry(f"ln_f.{x}", (d,), f"ln_f.{x}") for x in ("weight", "bias"))


def _turned(x: Tensor, entry: _Entry) -> Tensor:
    return x.T.contiguous() if entry.transposed else x


def _check(weights: dict[str, Tensor], needed: dict[str, tuple[int, ...]], config: GPTConfig) -> None:
    """Raise CheckpointError unless the names and shapes are the needed ones."""
    model = f"a {config.norm}-norm model of {config.n_layer} blocks"
    for problem, names in (("lack", needed.keys() - weights.keys()), ("hold", weights.keys() - needed.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            has = "needs" if problem == "lack" else "does not have"
            raise CheckpointError(
                f"the weights {problem} {min(names)}{more}, which {model} {has}; give the shape they were made with"
            )
    for name, shape in needed.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"{name} is {tuple(weights[name].shape)} and the model needs {shape}; give the shape it was made with"
            )
