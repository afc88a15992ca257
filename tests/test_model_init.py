"""The initial values: their spread, and that they are the same however the model is held."""

import pytest
import torch

from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

SHAPE = {"vocab_size": 300, "seq_len": 64, "n_layer": 3, "n_head": 4, "d_model": 64}
NORMS = pytest.mark.parametrize("norm", ["pre", "post"])


def build(seed=0, **changes):
    config = GPTConfig(**{**SHAPE, **changes})
    ops = load_ops("torch", head_width=config.head_width, dtype=torch.float32, device="cpu")
    torch.manual_seed(seed)
    return GPT(config, ops)


@NORMS
def test_every_tensor_has_the_spread_of_the_table(norm):
    for name, p in build(norm=norm).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            writes_to_the_stream = norm == "pre" and name.endswith("proj.weight")
            std = 0.02 / 6**0.5 if writes_to_the_stream else 0.02  # 2 L = 6 projections write to the stream
            assert p.std().item() == pytest.approx(std, rel=5 / (2 * p.numel()) ** 0.5), name
            assert p.mean().item() == pytest.approx(0, abs=5 * std / p.numel() ** 0.5), name


def test_no_two_tensors_begin_alike():
    beginnings = [tuple(p.flatten()[:8].tolist()) for p in build().parameters() if p.dim() == 2]
    assert len(set(beginnings)) == len(beginnings)


def test_a_seed_fixes_every_value():
    first, again, other = (build(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].dim() == 2)


def test_a_16_bit_model_begins_with_the_rounded_values():
    expected = {name: p.bfloat16() for name, p in build().state_dict().items()}
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = build().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(rounded[name], expected[name]) for name in expected)


def test_on_the_meta_device_the_seeds_are_drawn_all_the_same():
    build()
    after = torch.rand(1)
    with torch.device("meta"):
        build()
    assert torch.equal(torch.rand(1, device="cpu"), after)
