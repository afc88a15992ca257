"""Weights under the names and in the layout of transformers' GPT2LMHeadModel and OpenAIGPTLMHeadModel.

transformers keeps a projection as (in, out), the transpose of ``nn.Linear``'s (out, in); its order of q, k and v and
everything else is the same.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megagpt.errors import CheckpointError
from megagpt.model.config import GPTConfig
from megagpt.model.tensors import Tensors

PREFIX = "transformer."  # absent where the weights were saved without the output projection
_TABLES = {"pre": ("wte", "wpe"), "post": ("tokens_embed", "positions_embed")}
_PROJECTIONS = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
_HEAD = "lm_head.weight"
_CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")  # constants that files of older versions hold
_LISTED = 8  # names that a message tells


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

    def turned(self, x: Tensor) -> Tensor:
        return x.T.contiguous() if self.transposed else x


def as_transformers(tensors: Tensors, config: GPTConfig) -> Tensors:
    """``GPT``'s parameters as those of the model in GPT2LMHeadModel (pre-norm) or OpenAIGPTLMHeadModel (post-norm).

    The output projection is the token embedding itself and not among them. Raises CheckpointError unless ``tensors``
    are exactly the parameters of such a model.
    """
    entries = {PREFIX + entry.theirs: entry for entry in _entries(config)}
    _check(tensors, {entry.ours: entry.shape for entry in entries.values()}, config)
    return Tensors(
        {name: entry.shape_there for name, entry in entries.items()},
        lambda name: entries[name].turned(tensors.read(entries[name].ours)),
    )


def as_ours(tensors: Tensors, config: GPTConfig) -> Tensors:
    """``GPT``'s parameters from those of GPT2LMHeadModel, OpenAIGPTLMHeadModel or the model inside either.

    Raises CheckpointError unless ``tensors`` are exactly the parameters of such a model (causal masks, and the output
    projection where it is the token embedding, may be there too).
    """
    there = {name.removeprefix(PREFIX): name for name in tensors.shapes if not name.endswith(_CAUSAL_MASKS)}
    head = there.pop(_HEAD, None)
    inner = Tensors(
        {name: tensors.shapes[full] for name, full in there.items()}, lambda name: tensors.read(there[name])
    )
    entries = {entry.ours: entry for entry in _entries(config)}
    _check(inner, {entry.theirs: entry.shape_there for entry in entries.values()}, config)
    table = entries["wte.weight"].theirs
    if head is not None and not tensors.read(head).equal(inner.read(table)):
        raise CheckpointError(f"{_HEAD} differs from {table}: only models that share the two can be read")
    return Tensors(
        {name: entry.shape for name, entry in entries.items()},
        lambda name: entries[name].turned(inner.read(entries[name].theirs)),
    )


def to_transformers(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """:func:`as_transformers` of a state dict, with the output projection. Transposed tensors are copies."""
    return {**as_transformers(Tensors.of(weights), config).all(), _HEAD: weights["wte.weight"]}


def from_transformers(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """:func:`as_ours` of a state dict. Transposed tensors are copies."""
    return as_ours(Tensors.of(weights), config).all()


def _entries(config: GPTConfig) -> Iterator[_Entry]:
    if config.backbone != "transformer":
        raise CheckpointError(f"transformers has no model like this one, whose backbone is an {config.backbone}")
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


def _check(tensors: Tensors, needed: dict[str, tuple[int, ...]], config: GPTConfig) -> None:
    """Raise CheckpointError unless the names and shapes are the needed ones."""
    found = tensors.shapes
    model = f"a {config.norm}-norm model of {config.n_layer} blocks"
    missing, extra = needed.keys() - found.keys(), found.keys() - needed.keys()
    problems = [f"lack {_listed(missing)}, which {model} needs"] if missing else []
    problems += [f"hold {_listed(extra)}, which {model} does not have"] if extra else []
    if problems:
        raise CheckpointError(f"the weights {', and '.join(problems)}; give the shape they were made with")
    for name, shape in needed.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{name} is {found[name]} and the model needs {shape}; give the shape it was made with"
            )


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
