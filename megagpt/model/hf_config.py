"""The config.json of transformers' GPT2Config and OpenAIGPTConfig, to and from the shape of a decoder."""

import math

from megagpt.errors import CheckpointError, ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.tensors import DTYPES

MODEL_TYPES = {"pre": "gpt2", "post": "openai-gpt"}
CLASSES = {"pre": "GPT2", "post": "OpenAIGPT"}  # what the names of the model's classes begin with
_SIZES = {
    "vocab_size": "vocab_size",
    "n_positions": "seq_len",
    "n_embd": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
_RATES = {
    "embd_pdrop": "embd_dropout",
    "attn_pdrop": "attn_dropout",
    "resid_pdrop": "resid_dropout",
    "layer_norm_epsilon": "layer_norm_eps",
}
_RATE_DEFAULTS = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "layer_norm_epsilon": 1e-5}
_SIZE_DEFAULTS = {  # of transformers: a config.json may leave out what equals them
    "pre": {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "post": {"vocab_size": 40478, "n_positions": 512, "n_embd": 768, "n_layer": 12, "n_head": 12},
}
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
# Options that change what is computed: the values that this model has, the first of them where none is given.
_SERVED = {
    "pre": {
        "activation_function": _TANH_GELU,
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    "post": {"afn": ("gelu", *_TANH_GELU), "quantization_config": (None,)},  # this gelu is the tanh form there
}


def to_hf_config(config: GPTConfig, eot_id: int | None, dtype: str = "fp32") -> dict:
    """The config.json of the language model. Raises CheckpointError where transformers has no such model.

    ``dtype``, one of ``tensors.DTYPES``, is that of its weights.
    """
    if config.norm == "post" and config.d_ff != 4 * config.d_model:
        raise CheckpointError(
            f"transformers' OpenAIGPT has hidden layers of 4 x {config.d_model} = {4 * config.d_model} units and this "
            f"model of {config.d_ff}: it has no form there"
        )
    own = {"pre": {"n_inner": config.d_ff, "activation_function": "gelu_new"}, "post": {"afn": "gelu"}}
    return {
        "architectures": [f"{CLASSES[config.norm]}LMHeadModel"],
        "model_type": MODEL_TYPES[config.norm],
        **{theirs: getattr(config, ours) for theirs, ours in (_SIZES | _RATES).items()},
        **own[config.norm],
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": DTYPES[dtype][1],
    }


def from_hf_config(values: dict, where: str) -> GPTConfig:
    """The shape that a config.json describes. Raises CheckpointError for a model that is none of the two."""
    norms = {name: norm for norm, name in MODEL_TYPES.items()}
    if values.get("model_type") not in norms:
        raise CheckpointError(
            f"{where} is of a model of type {str(values.get('model_type'))[:80]!r}; {' and '.join(norms)} are read"
        )
    norm = norms[values["model_type"]]
    _check_class(values, norm, where)
    for name, served in _SERVED[norm].items():
        value = values.get(name, served[0])
        if value not in served or type(value) is not type(served[0]):
            raise CheckpointError(
                f"{where}: {name} is {str(value)[:80]!r}, and a model of MegaGPT computes {name} "
                f"{' or '.join(map(repr, served))} alone"
            )
    given = _SIZE_DEFAULTS[norm] | _RATE_DEFAULTS | {name: x for name, x in values.items() if x is not None}
    for name in _RATES:
        if type(given[name]) not in (int, float) or not math.isfinite(given[name]):
            raise CheckpointError(f"{where}: {name} is {str(given[name])[:80]!r} and has to be a number")
    fields = {ours: given[theirs] for theirs, ours in (_SIZES | _RATES).items()}
    try:
        return GPTConfig(norm=norm, d_ff=given.get("n_inner") if norm == "pre" else None, **fields)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where} describes no model: {error}") from None


def _check_class(values: dict, norm: str, where: str) -> None:
    read = [f"{CLASSES[norm]}LMHeadModel", f"{CLASSES[norm]}Model"]
    found = values.get("architectures") or read[:1]
    if not isinstance(found, list) or found[0] not in read:
        raise CheckpointError(f"{where} is of a {str(found)[:80]}; the language models {' and '.join(read)} are read")
