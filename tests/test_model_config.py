"""The shape of a decoder: what is refused, what the presets are, and what follows from a shape by arithmetic."""

import pytest
import torch

from megagpt.config.presets import MODELS, TRAINING, model_preset, training_preset
from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT, decays
from megagpt.ops import load_ops

SHAPE = {"vocab_size": 50, "seq_len": 8, "n_layer": 2, "n_head": 2, "d_model": 16}

# "gpt1" and "gpt2-*" as published; the others are V d + C d + L (12 d^2 + 13 d) + 2 d.
PARAMETERS = {
    "gpt1": 116_534_784,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "lstm": 40_478 * 768 + 4 * 2048 * (768 + 2048 + 2) + 2048 * 768 + 768,
    "tiny": 8_192 * 128 + 128 * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128,
    "1.3b": (50_257 + 2048) * 2048 + 24 * (12 * 2048**2 + 13 * 2048) + 2 * 2048,
    "2.7b": (50_257 + 2048) * 2560 + 32 * (12 * 2560**2 + 13 * 2560) + 2 * 2560,
    "6.7b": (50_257 + 2048) * 4096 + 32 * (12 * 4096**2 + 13 * 4096) + 2 * 4096,
    "13b": (50_257 + 2048) * 5120 + 40 * (12 * 5120**2 + 13 * 5120) + 2 * 5120,
    "175b": (50_257 + 2048) * 12288 + 96 * (12 * 12288**2 + 13 * 12288) + 2 * 12288,
}


def meta_model(config):
    """The model without memory for its parameters."""
    with torch.device("meta"):
        return GPT(config, load_ops("torch", head_width=config.head_width, dtype=torch.float32, device="meta"))


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_has_the_published_number_of_parameters(name):
    config = GPTConfig(**model_preset(name))
    assert config.n_params() == PARAMETERS[name]
    assert sum(p.numel() for p in meta_model(config).parameters()) == PARAMETERS[name]


def test_presets_are_the_published_shapes():
    def shape(name):
        config = GPTConfig(**model_preset(name))
        return config.norm, config.n_layer, config.d_model, config.n_head, config.d_ff, config.seq_len

    assert shape("gpt1") == ("post", 12, 768, 12, 3072, 512)
    assert shape("gpt2-small") == ("pre", 12, 768, 12, 3072, 1024)
    assert shape("gpt2-medium") == ("pre", 24, 1024, 16, 4096, 1024)
    assert shape("gpt2-large") == ("pre", 36, 1280, 20, 5120, 1024)
    assert shape("gpt2-xl") == ("pre", 48, 1600, 25, 6400, 1024)
    assert shape("tiny") == ("pre", 4, 128, 4, 512, 128)
    assert all(GPTConfig(**model_preset(name)).embd_dropout == 0.1 for name in MODELS if not name.endswith("b"))


@pytest.mark.parametrize(
    ("name", "billions"), [("1.3b", 1.3), ("2.7b", 2.7), ("6.7b", 6.7), ("13b", 13), ("175b", 175)]
)
def test_presets_named_by_their_size_have_it(name, billions):
    assert PARAMETERS[name] / 1e9 == pytest.approx(billions, rel=0.02)


def test_gpt1_trains_as_published_and_every_preset_has_its_settings():
    settings = training_preset("gpt1")
    assert (settings["lr"], settings["warmup_steps"], settings["global_batch_size"]) == (2.5e-4, 2000, 64)
    assert (settings["schedule"], settings["weight_decay"], settings["min_lr"]) == ("warmup_cosine", 0.01, 0.0)
    assert TRAINING.keys() == MODELS.keys()


def test_a_preset_may_be_changed_without_changing_the_table():
    for preset in (model_preset, training_preset):
        preset("gpt1").clear()
        assert preset("gpt1")


def test_a_misspelt_preset_gets_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"--model gpt2-smal is unknown \(did you mean 'gpt2-small'\?\); choose one of"
    ):
        model_preset("gpt2-smal")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be a whole number of at least 1"),
        ({"n_layer": 2.5}, "n_layer=2.5 must be a whole number of at least 1"),
        ({"n_layer": True}, "n_layer=True must be a whole number of at least 1"),
        ({"seq_len": -1}, "seq_len=-1 must be a whole number of at least 1"),
        ({"d_ff": 0}, "d_ff=0 must be a whole number of at least 1"),
        ({"n_head": 3}, "d_model=16 must be a multiple of n_head=3: heads share it evenly"),
        ({"embd_dropout": 1.0}, "embd_dropout=1.0 must be at least 0 and below 1"),
        ({"attn_dropout": -0.1}, "attn_dropout=-0.1 must be at least 0 and below 1"),
        ({"resid_dropout": float("nan")}, "resid_dropout=nan must be at least 0 and below 1"),
        ({"norm": "both"}, "norm='both' is unknown; choose pre or post"),
        ({"embd_dropout_mode": "rows"}, "embd_dropout_mode='rows' is unknown; choose sum or matrix"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be above 0"),
        ({"activation_checkpointing": -1}, r"activation_checkpointing=-1 must be 0 \(off\) or k: every k-th block"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        GPTConfig(**{**SHAPE, **change})


def test_a_config_survives_being_written_down():
    config = GPTConfig(**SHAPE, norm="post", attn_dropout=0.2)
    assert GPTConfig.from_dict(config.to_dict()) == config
    assert config.d_ff == 64


def test_what_is_no_property_or_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"'n_layers' is no property of a model \(did you mean 'n_layer'\?\)"):
        GPTConfig.from_dict({**SHAPE, "n_layers": 2})
    with pytest.raises(ConfigError, match="a model needs seq_len, n_head"):
        GPTConfig.from_dict({"vocab_size": 50, "n_layer": 2, "d_model": 16})


def test_flops_are_six_a_parameter_and_the_unmasked_half_of_attention():
    """By hand for one block of width 16 over 8 positions, all products of forward and backward."""
    config = GPTConfig(**{**SHAPE, "n_layer": 1})
    mean_keys_seen = 8 / 2
    attention = 3 * 2 * (2 * 16 * mean_keys_seen)  # scores and values, two FLOPs a multiplication, backward is twice
    assert config.flops_per_token() == 6 * config.n_params() + attention
    assert config.flops_per_token(4) == 6 * config.n_params() + attention / 2


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_matrices_decay_and_biases_and_gains_do_not(norm):
    for name, p in meta_model(GPTConfig(**SHAPE, norm=norm)).named_parameters():
        assert decays(name) == (p.dim() == 2), name
