"""The kernels of dropout, residual sum and LayerNorm against the definition in float64."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_captured_by_a_graph, assert_serves_autograd, gradients
from numerics import DTYPES, assert_as_accurate, draw

from megagpt.ops import torch_ops
from megagpt.ops.masks import HashedMasks
from megagpt_kernels import add_layer_norm, layer_norm

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ANY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module")
def seed(device):
    return torch.tensor(-(1 << 40) + 7, device=device)


def inputs_of(*shape, residual=True):
    D = shape[-1]
    inputs = {"x": draw(0, *shape), "weight": draw(1, D, mean=1.0), "bias": draw(2, D)}
    return {**inputs, "residual": draw(3, *shape, mean=0.5)} if residual else inputs


def check(inputs, dtype, device, weight_dtype=None, **options):
    def with_inputs(fn):
        def call(x, weight, bias, residual=None):
            if weight_dtype and x.dtype != torch.float64:
                weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)
            return fn(x, residual, weight, bias, **options)

        return call

    inputs = {name: x.to(device) for name, x in inputs.items()}
    ours, definition = with_inputs(add_layer_norm), with_inputs(torch_ops.add_layer_norm)
    assert_as_accurate(ours, definition, inputs, dtype, gradient_factor=2)


@ANY_DTYPE
@pytest.mark.parametrize(
    "shape",
    [(5, 1), (3, 7), (61, 64), (2, 3, 768), (7, 1000), (3, 1025), (1, 2049), (1, 5120)],
    ids=str,
)
def test_add_layer_norm_is_as_accurate_as_torch(shape, dtype, device, seed):
    check(inputs_of(*shape), dtype, device, dropout_p=0.2, seed=seed, prenorm=True)


@pytest.mark.parametrize("D", [9000, 16384])
def test_rows_that_leave_registers_no_room_are_as_accurate_as_torch(D, device, seed):
    check(inputs_of(1, D), torch.bfloat16, device, dropout_p=0.2, seed=seed, prenorm=True)


@ANY_DTYPE
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (1, 530)], ids=str)
def test_every_form_is_as_accurate_as_torch(shape, residual, prenorm, p, dtype, device, seed):
    check(inputs_of(*shape, residual=residual), dtype, device, dropout_p=p, seed=seed, prenorm=prenorm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_rows_may_have_weights_in_float32(dtype, device, seed):
    check(inputs_of(9, 300), dtype, device, torch.float32, dropout_p=0.2, seed=seed, prenorm=True)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    D=st.integers(8, 400),
    p=st.sampled_from([0.0, 0.4]),
    form=st.tuples(st.booleans(), st.booleans()),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_will_do(shape, D, p, form, dtype, device, seed):
    residual, prenorm = form
    check(inputs_of(*shape, D, residual=residual), dtype, device, dropout_p=p, seed=seed, prenorm=prenorm)


def test_layer_norm_is_add_layer_norm_of_nothing_else(device):
    x, weight, bias = (x.float().to(device).requires_grad_() for x in inputs_of(6, 33, residual=False).values())
    normed, total = add_layer_norm(x, None, weight, bias, prenorm=True)
    assert total is x
    assert torch.equal(layer_norm(x, weight, bias), normed)


def test_epsilon_stands_inside_the_square_root(device):
    x = torch.tensor([1.0, -1.0], device=device)  # mean 0, variance 1
    one, zero = torch.ones(2, device=device), torch.zeros(2, device=device)
    assert layer_norm(x, one, zero, eps=3.0).tolist() == [0.5, -0.5]


@pytest.mark.parametrize("level", [0.0, 1.0, -3e4])
def test_of_a_constant_row_only_the_bias_is_left(level, device):
    x = torch.full((3, 777), level, device=device, requires_grad=True)
    weight, bias = (draw(i, 777).float().to(device).requires_grad_() for i in range(2))
    normed = layer_norm(x, weight, bias)
    assert torch.allclose(normed, bias.expand_as(normed), atol=2e-2)  # rstd = 316 times the mean's rounding
    d_weight = torch.autograd.grad(normed.sum(), weight)[0]
    assert d_weight.abs().max() <= 5e-2


def test_variance_is_not_a_difference_of_large_squares(device):
    """E[x^2] - E[x]^2 would lose a variance of 1 at a mean of 1e4 altogether."""
    inputs = {**inputs_of(4, 640, residual=False), "x": draw(0, 4, 640, mean=1e4)}
    check(inputs, torch.float32, device)


def test_the_mask_is_the_definitions_and_the_gradients_too(device, seed):
    """With a sum alone to differentiate, the gradient of ones is the mask."""
    shape, p = (30, 300), 0.3
    x, zero = torch.ones(shape, device=device, requires_grad=True), torch.zeros(shape, device=device)
    weight = torch.ones(300, device=device)
    everything = slice(None)
    mask = HashedMasks(seed, p, (1, *shape))(everything, everything, everything)[0]
    _, total = add_layer_norm(x, zero, weight, weight, dropout_p=p, seed=seed, prenorm=True)
    assert torch.equal(total, mask)
    assert torch.equal(torch.autograd.grad(total, x, torch.ones_like(x))[0], mask)
    _, without_residual = add_layer_norm(x, None, weight, weight, dropout_p=p, seed=seed, prenorm=True)
    assert torch.equal(without_residual, mask)


def test_the_mask_does_not_depend_on_the_tiles(device, seed):
    """A wide row's keys come from a table."""
    x = torch.ones(2, 8193, device=device, requires_grad=True)
    weight = torch.ones(8193, device=device)
    _, total = add_layer_norm(x, None, weight, weight, dropout_p=0.5, seed=seed, prenorm=True)
    assert torch.equal(total, torch_ops.dropout(torch.ones_like(x), p=0.5, seed=seed))
    assert torch.equal(torch.autograd.grad(total, x, torch.ones_like(x))[0], total)


def test_without_dropout_both_inputs_get_the_same_gradient(device):
    leaves = [x.float().to(device).requires_grad_() for x in inputs_of(9, 70).values()]
    x, weight, bias, residual = leaves
    outputs = add_layer_norm(x, residual, weight, bias, prenorm=True)
    dx, _, _, d_residual = gradients(outputs, leaves)
    assert torch.equal(dx, d_residual)


def test_strides_do_not_matter(device, seed):
    x, weight, bias, residual = (x.float().to(device) for x in inputs_of(13, 12).values())
    strided = [x.t().contiguous().t(), residual[:1].expand(13, 12), weight.repeat_interleave(2)[::2], bias]
    packed = [x, residual[:1].repeat(13, 1), weight, bias]
    for leaf in strided + packed:
        leaf.requires_grad_()
    fn = functools.partial(add_layer_norm, dropout_p=0.2, seed=seed, prenorm=True)
    ours, theirs = fn(*strided), fn(*packed)
    assert all(map(torch.equal, ours, theirs))
    assert all(map(torch.equal, gradients(ours, strided), gradients(theirs, packed)))
    expanded = torch.autograd.grad(fn(*packed)[0].sum(), packed)  # the incoming gradient has stride 0
    full = torch.autograd.grad(fn(*packed)[0], packed, torch.ones_like(x))
    assert all(map(torch.equal, expanded, full))


def test_only_the_sum_its_statistics_and_the_weight_are_kept(device, seed):
    x, weight, bias, residual = (x.float().to(device).requires_grad_() for x in inputs_of(64, 100).values())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        add_layer_norm(x, residual, weight, bias, dropout_p=0.5, seed=seed)
    assert sorted(kept) == [1, 64, 64, 100, 6400]


def test_no_rows_have_no_gradient(device):
    x, weight = torch.ones(0, 6, device=device, requires_grad=True), torch.ones(6, device=device, requires_grad=True)
    normed = layer_norm(x, weight, weight.detach())
    assert normed.shape == (0, 6)
    assert torch.autograd.grad(normed.sum(), weight)[0].tolist() == [0] * 6


def test_a_residual_that_would_have_to_be_broadcast_is_refused(device):
    x, weight = torch.ones(4, 6, device=device), torch.ones(6, device=device)
    with pytest.raises(ValueError, match=r"residual is torch.float32 \(6,\), and x torch.float32 \(4, 6\)"):
        add_layer_norm(x, x[0], weight, weight)
    with pytest.raises(ValueError, match="float64"):
        add_layer_norm(x, x.double(), weight, weight)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_add_layer_norm_serves_autograd_in_every_way(p, device, seed):
    x, weight, bias, residual = (x.float().to(device).requires_grad_() for x in inputs_of(37, 40).values())
    fn = functools.partial(add_layer_norm, dropout_p=p, seed=seed, prenorm=True)
    assert_serves_autograd(fn, [x, residual, weight, bias])


def test_add_layer_norm_is_registered_soundly(device, seed):
    x, weight, bias, residual = (x.float().to(device).requires_grad_() for x in inputs_of(3, 5).values())
    check = functools.partial(torch.library.opcheck, torch.ops.megagpt.add_layer_norm.default)
    check((x, residual, weight, bias, seed, 0.3, 1e-5))
    check((x, None, weight, bias, None, 0.0, 1e-5))
    x, weight = x.detach(), weight.detach()
    check = functools.partial(torch.library.opcheck, torch.ops.megagpt.add_layer_norm_backward.default)
    check((x, x, x, weight, x[:, 0].contiguous(), x[:, 1].contiguous(), seed, 0.3, True))
    check((x, None, x, weight, x[:, 0].contiguous(), x[:, 1].contiguous(), None, 0.0, True))


def test_a_second_derivative_is_refused(device):
    x, weight = torch.ones(3, 4, device=device, requires_grad=True), torch.ones(4, device=device)
    (slope,) = torch.autograd.grad(layer_norm(x, weight, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_cuda_graph_replays_add_layer_norm(device, seed):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    x, weight, bias, residual = (x.float().to(device).requires_grad_() for x in inputs_of(37, 40).values())
    fn = functools.partial(add_layer_norm, dropout_p=0.3, seed=seed, prenorm=True)
    assert_captured_by_a_graph(fn, [x, residual, weight, bias])
