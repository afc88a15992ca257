"""Optimisers against hand-worked traces and torch's own."""

import pytest
import torch

from megagpt.errors import ConfigError
from megagpt.train.optim import behind_guard, build_optimizer, parameter_groups
from megagpt.train.schedule import warmup_linear

GOLDEN = {
    "openai_adam": {
        1: [1.0, -2.0, 3.0],
        2: [0.9904214151, -1.9903981120, 2.9903748134],
        5: [0.9623783760, -1.9623008839, 2.9622234022],
    },
    "adamw": {5: [0.9620703722, -1.9616804284, 2.9612904852]},
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_five_updates_give_the_golden_trace(name):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    groups = [{"params": [p], "weight_decay": 1e-2, "lr": 0.0}]
    optimizer, _ = build_optimizer(name, groups, betas=(0.9, 0.999), eps=1e-8)
    for i in range(1, 6):
        optimizer.param_groups[0]["lr"] = 1e-2 * warmup_linear(i - 1, 100, 0.002)
        p.grad = i * torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
        optimizer.step()
        if i in GOLDEN[name]:
            torch.testing.assert_close(p.data, torch.tensor(GOLDEN[name][i], dtype=torch.float64), atol=1e-9, rtol=0)


def test_groups_split_by_name_and_keep_every_parameter_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = parameter_groups(model.named_parameters(), lambda name: name == "0.weight", lr=0.1, weight_decay=0.01)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("decay", 0.01, 1),
        ("no_decay", 0.0, 3),
    ]


def test_guarded_step_clips_by_the_global_norm_like_torch():
    def updated(make, clip_outside):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(2, 3))]
        optimizer = make(params)
        for p in params:
            p.grad = 10 * torch.randn_like(p)
        if clip_outside:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return params

    def guarded(params):
        optimizer = behind_guard(torch.optim.AdamW)(params, lr=0.1)
        optimizer.clip = 1.0
        return optimizer

    for ours, theirs in zip(
        updated(guarded, False), updated(lambda p: torch.optim.AdamW(p, lr=0.1), True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_gradient_that_is_not_finite_changes_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = behind_guard(torch.optim.AdamW)([p], lr=0.1)
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(p.data, torch.ones(3))
    assert not optimizer.state
    p.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.overflow
    assert not torch.equal(p.data, torch.ones(3))


@pytest.mark.parametrize("name", ["adamw", "openai_adam", "apex"])
def test_every_optimizer_can_be_guarded(name, monkeypatch):
    """apex's was not: unsharded fp32 training with it was neither clipped nor kept from a NaN."""

    class FusedAdam(torch.optim.AdamW):  # takes what apex's takes
        def __init__(self, params, adam_w_mode, **settings):
            super().__init__(params, **settings)

    monkeypatch.setattr("megagpt.train.optim.apex_fused_adam", lambda: FusedAdam)
    p = torch.nn.Parameter(torch.zeros(4))
    groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.0}]
    optimizer, _ = build_optimizer(name, groups, betas=(0.0, 0.0), eps=1.0, guarded=True, clip=1.0)
    p.grad = torch.full((4,), float("nan"))
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(p.data, torch.zeros(4))
    p.grad = torch.full((4,), 50.0)  # of norm 100: clipped to 0.5 each, and Adam without moments moves by g / (|g| + 1)
    optimizer.step()
    torch.testing.assert_close(p.data, torch.full((4,), -0.1 * 0.5 / 1.5))


def test_unknown_optimizer_and_missing_apex_are_refused_in_words():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}]
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        build_optimizer("adamv", groups, betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(ConfigError, match="package called apex on PyPI is another"):
        build_optimizer("apex", groups, betas=(0.9, 0.999), eps=1e-8)
