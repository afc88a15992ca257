"""The kernel of dropout: the definition's mask bit by bit."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_captured_by_a_graph, assert_serves_autograd
from numerics import DTYPES, assert_as_accurate, draw

from megagpt.ops import torch_ops
from megagpt_kernels import dropout

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(scope="module")
def seed(device):
    return torch.tensor(99, device=device)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1,), (5, 1), (1, 7), (200, 64), (2, 3, 768), (3, 1000), (5, 1025)], ids=str)
def test_dropout_is_the_definition_bit_by_bit(shape, p, device, seed):
    """float32, which the interpreter rounds as a GPU does."""
    x = draw(0, *shape).float().to(device).requires_grad_()
    ours, definition = dropout(x, p=p, seed=seed), torch_ops.dropout(x, p=p, seed=seed)
    assert torch.equal(ours, definition)
    upstream = draw(1, *shape).float().to(device)
    assert torch.equal(torch.autograd.grad(ours, x, upstream)[0], torch.autograd.grad(definition, x, upstream)[0])


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3),
    D=st.integers(1, 300),
    p=st.floats(0.01, 0.99),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_will_do(shape, D, p, dtype, device, seed):
    ours, definition = (functools.partial(ops, p=p, seed=seed) for ops in (dropout, torch_ops.dropout))
    assert_as_accurate(ours, definition, {"x": draw(0, *shape, D).to(device)}, dtype, gradient_factor=2)


def test_as_many_elements_are_kept_as_they_should(device, seed):
    kept = dropout(torch.ones(256, 256, device=device), p=0.1, seed=seed).count_nonzero().item()
    n = 256 * 256
    assert abs(kept - 0.9 * n) < 4 * (0.1 * 0.9 * n) ** 0.5


def test_another_seed_is_another_mask(device):
    x = torch.ones(8, 64, device=device)
    masks = [dropout(x, p=0.5, seed=torch.tensor(i, device=device)) for i in range(2)]
    assert 150 < (masks[0] != masks[1]).sum() < 362  # 256 +- 9 standard deviations


def test_without_dropout_nothing_is_computed(device):
    x = torch.ones(3, device=device)
    assert dropout(x, p=0.0, seed=None) is x


def test_strides_do_not_matter(device, seed):
    x = draw(0, 33, 12).float().to(device)
    assert torch.equal(dropout(x.t().contiguous().t(), p=0.3, seed=seed), dropout(x, p=0.3, seed=seed))


def test_no_mask_is_kept(device, seed):
    kept = []
    x = torch.ones(64, 100, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        dropout(x, p=0.5, seed=seed)
    assert kept == [1]


def test_dropout_serves_autograd_in_every_way(device, seed):
    x = draw(0, 37, 40).float().to(device).requires_grad_()
    assert_serves_autograd(functools.partial(dropout, p=0.3, seed=seed), [x])


def test_dropout_is_registered_soundly(device, seed):
    x = draw(0, 3, 5).float().to(device).requires_grad_()
    torch.library.opcheck(torch.ops.megagpt.dropout.default, (x, seed, 0.3))
    torch.library.opcheck(torch.ops.megagpt.dropout_backward.default, (x.detach(), seed, 0.3))


def test_a_cuda_graph_replays_dropout(device, seed):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    x = draw(0, 37, 40).float().to(device).requires_grad_()
    assert_captured_by_a_graph(lambda x: (dropout(x, p=0.3, seed=seed),), [x])
