"""Output projection and cross-entropy in one operation, against the definition written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, LargestTensor, assert_as_accurate, assert_equal_to_rounding, draw

from megagpt.errors import DataError
from megagpt.ops import precision, torch_cross_entropy
from megagpt.ops.torch_ops import linear_cross_entropy, weighted_cross_entropy


def definition(hidden, weight, targets, *, ignore_index=-100, z_loss=0.0):
    """Target by target."""
    logits = (hidden @ weight.mT).to(torch.promote_types(hidden.dtype, torch.float32))
    lse = logits.exp().sum(1).log()
    losses = [lse[i] - logits[i, t] + z_loss * lse[i] ** 2 for i, t in enumerate(targets.tolist()) if t != ignore_index]
    return torch.stack(losses).mean() if losses else logits.sum() * 0.0


def problem(N, D, V, ignored=(), ignore_index=-100):
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(N))
    targets[list(ignored)] = ignore_index
    return {"hidden": draw(0, N, D), "weight": draw(1, V, D, std=D**-0.5), "targets": targets}


def bound(fn, **options):
    return lambda hidden, weight, targets: fn(hidden, weight, targets, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "D", "V", "ignored"),
    [
        (1, 1, 1, ()),
        (1, 8, 2, ()),
        (7, 5, 33, (0, 6)),
        (40, 16, 257, range(10, 30)),
        (3, 700, 5, (1,)),
        (3, 4, 5, range(3)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2}], ids=str)
def test_it_is_as_accurate_as_its_definition(N, D, V, ignored, options, dtype, poisoned_memory):
    inputs = problem(N, D, V, ignored)
    assert_as_accurate(bound(linear_cross_entropy, **options), bound(definition, **options), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_products_in_16_bit_are_as_accurate_as_the_definitions(dtype, monkeypatch, poisoned_memory):
    """As on a device that has them, on any CPU."""
    monkeypatch.setattr(precision, "_cpu_multiplies", lambda dtype: True)
    assert_as_accurate(linear_cross_entropy, definition, problem(300, 16, 257, range(10, 30)), dtype)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), N=st.integers(1, 12), D=st.integers(1, 6), V=st.integers(1, 20), z_loss=st.sampled_from([0.0, 0.1])
)
def test_it_is_its_definition_for_any_shape(data, N, D, V, z_loss):
    ignore_index = data.draw(st.sampled_from([-100, -1, 0, V]))
    inputs = problem(N, D, V, data.draw(st.sets(st.integers(0, N - 1))), ignore_index)
    options = {"z_loss": z_loss, "ignore_index": ignore_index}
    assert_equal_to_rounding(bound(linear_cross_entropy, **options), bound(definition, **options), inputs)


@pytest.mark.parametrize("N", [1, 2, 3, 4, 6, 7])
def test_chunks_add_up(N, monkeypatch):
    monkeypatch.setattr(torch_cross_entropy, "_CPU_LOGITS", 3 * 11 + 5)
    monkeypatch.setattr(torch_cross_entropy, "_CPU_ROWS", 1)
    inputs = problem(N, 5, 11, ignored=range(1, N, 3))
    assert_equal_to_rounding(bound(linear_cross_entropy, z_loss=0.1), bound(definition, z_loss=0.1), inputs)


def test_gradients_are_those_of_finite_differences():
    inputs = problem(6, 4, 9, ignored=(2,))
    leaves = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, inputs["targets"], z_loss=0.1), leaves)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_stays_the_same(frozen):
    inputs = problem(6, 4, 9)
    leaves = {name: x for name, x in inputs.items() if name != "targets"}
    for x in leaves.values():
        x.requires_grad_()
    expected = torch.autograd.grad(definition(**inputs), list(leaves.values()))
    for name, x in leaves.items():
        x.requires_grad_(frozen not in (name, "both"))
    loss = linear_cross_entropy(**inputs)
    torch.testing.assert_close(loss, definition(**inputs).float(), check_dtype=False)
    if frozen != "both":
        loss.backward()
        for x, gradient in zip(leaves.values(), expected, strict=True):
            assert x.grad is None if not x.requires_grad else torch.allclose(x.grad, gradient)


def test_without_targets_that_count_loss_and_gradients_are_zero():
    inputs = problem(5, 4, 9, ignored=range(5))
    leaves = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    loss = linear_cross_entropy(**inputs, z_loss=0.1)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, leaves))


def test_what_is_ignored_may_be_anything():
    """Even what is not a number: a padded row counts for nothing, in the loss and in either gradient."""
    inputs = problem(6, 4, 9, ignored=(1, 5))
    expected = [linear_cross_entropy(**inputs), *_gradients(inputs)]
    inputs["hidden"] = inputs["hidden"].clone()
    inputs["hidden"][[1, 5]] = 1e30
    found = [linear_cross_entropy(**inputs), *_gradients(inputs)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _gradients(inputs):
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
    return torch.autograd.grad(linear_cross_entropy(*leaves, inputs["targets"]), leaves)


def test_large_logits_do_not_overflow():
    inputs = {"hidden": torch.tensor([[1e4, -1e4]]), "weight": torch.eye(2), "targets": torch.tensor([1])}
    assert linear_cross_entropy(**inputs).item() == 2e4


def test_gradients_in_half_precision_do_not_vanish():
    """A part of a mean over 4096 tokens is below what float16 holds; with a loss scale it must come out right."""
    inputs = {name: x.half() if x.is_floating_point() else x for name, x in problem(4096, 8, 50).items()}
    scale = 2.0**14
    grads = []
    for fn, dtype in ((linear_cross_entropy, torch.float16), (definition, torch.float64)):
        leaves = [inputs[name].to(dtype).requires_grad_() for name in ("hidden", "weight")]
        grads.append(torch.autograd.grad(scale * fn(*leaves, inputs["targets"]), leaves))
    for ours, exact in zip(*grads, strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < 1e-3


def test_the_gradient_can_be_asked_for_twice():
    inputs = problem(6, 4, 9)
    weight = inputs["weight"].requires_grad_()
    loss = 3 * linear_cross_entropy(**inputs)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    first_copy = first.clone()
    first.zero_()  # what an optimiser does with a gradient it was given
    torch.testing.assert_close(second, first_copy)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], first_copy)


def test_a_gradient_that_arrives_as_one_is_not_the_kept_tensor():
    """Accumulating into the first gradient must not change what a second backward pass returns."""
    inputs = problem(6, 4, 9)
    weight = inputs["weight"].requires_grad_()
    loss = linear_cross_entropy(**inputs)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 3 * once)


@pytest.mark.parametrize("wrong", [-1, 9, 10**12])
def test_a_target_outside_of_the_vocabulary_is_an_error(wrong):
    inputs = problem(5, 4, 9, ignored=(0,))
    inputs["targets"][3] = wrong
    with pytest.raises(DataError, match=rf"target {wrong} is outside of the model's vocabulary of 9.*--vocab_size"):
        linear_cross_entropy(**inputs)


def test_the_logits_are_never_whole():
    N, D, V = 3000, 8, 4001
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in problem(N, D, V).items()}
    leaves = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    with LargestTensor() as largest:
        linear_cross_entropy(**inputs).backward()
    assert all(leaf.grad is not None for leaf in leaves)
    assert largest.elements < N * V / 4


def test_a_weighted_sum_is_that_of_the_rows_own_losses_and_so_are_its_gradients():
    inputs = problem(300, 16, 257)
    hidden, weight = (inputs[name].double().requires_grad_() for name in ("hidden", "weight"))
    weights = torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    weights[::7] = 0
    expected = F.cross_entropy(hidden @ weight.T, inputs["targets"], reduction="none") @ weights
    found = weighted_cross_entropy(hidden, weight, inputs["targets"], weights)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert weighted_cross_entropy(hidden, weight, inputs["targets"], torch.zeros(300)).item() == 0
