"""The shape of a decoder, checked when it is made, and what follows from it by arithmetic."""

from dataclasses import asdict, dataclass, fields

from megagpt.errors import ConfigError, nearest

_CHOICES = {"norm": ("pre", "post"), "embd_dropout_mode": ("sum", "matrix"), "backbone": ("transformer", "lstm")}
_SIZES = ("vocab_size", "seq_len", "n_layer", "n_head", "d_model", "d_ff")
_LARGEST = 2**31 - 1
_RATES = ("embd_dropout", "attn_dropout", "resid_dropout")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a decoder and its dropout rates. Raises ConfigError when the parts do not fit together."""

    vocab_size: int
    seq_len: int  # longest sequence the position table serves
    n_layer: int
    n_head: int
    d_model: int
    d_ff: int | None = None  # width of the hidden layer; None: 4 * d_model
    norm: str = "pre"  # LayerNorm before each sub-layer (GPT-2) or "post": after each residual sum (GPT-1)
    embd_dropout: float = 0.1
    attn_dropout: float = 0.1  # on attention probabilities
    resid_dropout: float = 0.1  # on what a sub-layer adds to the residual stream
    # "sum": on token + position embedding. "matrix": one mask a step over the tables' entries, shared by every
    # occurrence of a token and by the tied output projection (released GPT-1 code).
    embd_dropout_mode: str = "sum"
    layer_norm_eps: float = 1e-5
    # "lstm": blocks of a recurrent layer of d_ff units and no position table (norm and n_head mean nothing then)
    backbone: str = "transformer"
    activation_checkpointing: int = 0  # recompute every k-th block in the backward pass; 0: none, 1: all

    def __post_init__(self) -> None:
        if self.d_ff is None and type(self.d_model) is int:
            object.__setattr__(self, "d_ff", 4 * self.d_model)
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _LARGEST:
                below = " and below 2^31" if type(value) is int and value > 1 else ""
                raise ConfigError(f"{name}={repr(value)[:80]} must be a whole number of at least 1{below}")
        if self.d_model % self.n_head:
            raise ConfigError(
                f"d_model={self.d_model} must be a multiple of n_head={self.n_head}: heads share it evenly"
            )
        for name in _RATES:
            if not (_is_number(getattr(self, name)) and 0.0 <= getattr(self, name) < 1.0):
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown; choose {' or '.join(choices)}")
        if not (_is_number(self.layer_norm_eps) and 0 < self.layer_norm_eps < 1e30):
            raise ConfigError(f"layer_norm_eps={self.layer_norm_eps} must be above 0")
        if type(self.activation_checkpointing) is not int or self.activation_checkpointing < 0:
            raise ConfigError(
                f"activation_checkpointing={self.activation_checkpointing} must be 0 (off) or k: every k-th block"
            )

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_head

    def n_params(self) -> int:
        """Number of trained parameters; the output projection is the token embedding."""
        d, f = self.d_model, self.d_ff
        if self.backbone == "lstm":
            recurrent = 4 * f * (d + f) + 8 * f  # four gates with two biases each
            return self.vocab_size * d + self.n_layer * (recurrent + f * d + d)
        attention = 3 * d * d + 3 * d + d * d + d
        mlp = 2 * d * f + f + d
        norms = 4 * d
        final_norm = 2 * d if self.norm == "pre" else 0
        return (self.vocab_size + self.seq_len) * d + self.n_layer * (attention + mlp + norms) + final_norm

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """FLOPs of forward and backward a token, for sequences of ``seq_len``: 6 N + 6 L T d.

        N counts every parameter, the tied head once; the second term is causal attention, counted without its masked
        half (4 T d forward a layer, halved, times three for forward and backward). An LSTM has no second term.
        """
        if self.backbone == "lstm":
            return 6.0 * self.n_params()
        return 6.0 * self.n_params() + 6.0 * self.n_layer * (seq_len or self.seq_len) * self.d_model

    def to_dict(self) -> dict:
        """The fields as plain data. A transformer does not say that it is one: checkpoints of old do not either."""
        values = asdict(self)
        if self.backbone == "transformer":
            del values["backbone"]
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """The config with these fields. Raises ConfigError for a name that is no field, or one that is missing."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"{name!r} is no property of a model{nearest(name, known)}")
        missing = [name for name in _SIZES if name not in values and name != "d_ff"]
        if missing:
            raise ConfigError(f"a model needs {', '.join(missing)}")
        return cls(**values)
