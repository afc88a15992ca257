"""The initial values: their spread, and that they are the same however the model is held."""

import hashlib

import pytest
import torch
from distributed import run_ranks

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


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def build_sharded(norm):
    """Digests of the gathered values, (elements, elements held here) of each, and the most elements ever held whole."""
    import os

    from megagpt import dist
    from megagpt.config import deepspeed as ds
    from megagpt.config.fields import TrainSettings
    from megagpt.train import engine

    world = dist.resolve_world(os.environ)
    raw = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    settings = TrainSettings(ds_config="zero3.json", data=("none",), run_dir="none")
    config = ds.resolve(raw, settings, world.world_size, path="zero3.json", hidden_size=SHAPE["d_model"])
    engine.start_distributed(world, timeout_minutes=1)
    registered, most = [], [0]

    def count(module, name, parameter):
        registered.append(parameter)
        most[0] = max(most[0], sum(p.numel() for p in registered))

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    with engine.sharded_construction(config):
        model = build(norm=norm)
    handle.remove()
    held = {name: (p.ds_numel, p.ds_tensor.numel()) for name, p in model.named_parameters()}
    with engine.full_parameters(list(model.parameters()), config):
        digests = {name: digest(p) for name, p in model.named_parameters()}
    engine.stop_distributed()
    return digests, held, most[0]


@NORMS
def test_split_over_ranks_the_values_are_the_same_and_no_rank_ever_holds_the_whole(norm):
    whole = build(norm=norm)
    expected = {name: digest(p) for name, p in whole.named_parameters()}
    largest_module = max(p.numel() + SHAPE["d_model"] * 4 for p in whole.parameters())
    for (digests, held, most), _ in run_ranks(build_sharded, 2, norm):
        assert digests == expected
        assert all(local == -(-n // 2) for n, local in held.values()), held
        assert 0 < most <= largest_module
