"""Projections, GELU, LayerNorm and dropout of both backends against their definitions, written out in float64."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, assert_as_accurate, assert_equal_to_rounding, draw

from megagpt.ops import cpu_ops, torch_ops

BACKENDS = pytest.mark.parametrize("ops", [torch_ops, cpu_ops], ids=["torch", "cpu"])
ANY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Of rows of one or two elements the variance or the gradient is 0, and rounding is all that is left to compare.
NORM_SHAPES = pytest.mark.parametrize("shape", [(1, 4), (5,), (7, 33), (2, 5, 96), (3, 1, 700)], ids=str)
SEED = torch.tensor(7)


def plain_gelu(x, bias):
    u = x + bias
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


def plain_layer_norm(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def plain_add_layer_norm(x, weight, bias, residual=0.0, *, multiplier=1.0, eps=1e-5):
    """The pair (normalised, sum)."""
    if isinstance(multiplier, torch.Tensor):
        multiplier = multiplier.to(x.dtype)
    total = x * multiplier + residual
    return plain_layer_norm(total, weight, bias, eps), total


def norm_inputs(*shape, residual=True):
    D = shape[-1]
    inputs = {"x": draw(0, *shape), "weight": draw(1, D, mean=1.0), "bias": draw(2, D)}
    return {**inputs, "residual": draw(3, *shape, mean=0.5)} if residual else inputs


def multiplier_of(ops, p, *shape, seed=SEED):
    return ops.dropout(torch.ones(shape), p=p, seed=seed)


def test_gelu_has_the_values_of_the_tanh_form():
    """The erf form differs from these by up to 4.7e-4."""
    x = torch.tensor([-3, -1, -0.5, 0.5, 1, 2.2, 3], dtype=torch.float64)
    golden = [-0.0036373921, -0.1588080094, -0.1542859902, 0.3457140098, 0.8411919906, 2.1696785270, 2.9963626079]
    y = torch_ops.bias_gelu(x - 0.25, torch.full((7,), 0.25, dtype=torch.float64))
    assert y.tolist() == pytest.approx(golden, abs=5e-11)


@ANY_DTYPE
@pytest.mark.parametrize("shape", [(300,), (7, 33), (2, 5, 96), (3, 1, 700)], ids=str)
def test_bias_gelu_is_as_accurate_as_its_definition(shape, dtype, poisoned_memory):
    inputs = {"x": draw(0, *shape, std=2), "bias": draw(1, shape[-1])}
    assert_as_accurate(torch_ops.bias_gelu, plain_gelu, inputs, dtype)


def test_gelu_is_finite_far_out():
    x = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4], requires_grad=True)
    y = torch_ops.bias_gelu(x, torch.zeros(5))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0, 0, 0, 30, 1e4]
    assert slope.tolist() == [0, 0, 0.5, 1, 1]


@BACKENDS
@ANY_DTYPE
@NORM_SHAPES
def test_layer_norm_is_as_accurate_as_its_definition(ops, shape, dtype, poisoned_memory):
    assert_as_accurate(ops.layer_norm, plain_layer_norm, norm_inputs(*shape, residual=False), dtype)


@BACKENDS
@ANY_DTYPE
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@NORM_SHAPES
def test_add_layer_norm_is_as_accurate_as_its_definition(ops, shape, residual, prenorm, p, dtype, poisoned_memory):
    multiplier = multiplier_of(ops, p, *shape)

    def ours(x, weight, bias, residual=None):
        return ops.add_layer_norm(x, residual, weight, bias, dropout_p=p, seed=SEED, prenorm=prenorm)

    def definition(**inputs):
        both = plain_add_layer_norm(**inputs, multiplier=multiplier)
        return both if prenorm else both[0]

    assert_as_accurate(ours, definition, norm_inputs(*shape, residual=residual), dtype)


@BACKENDS
def test_epsilon_stands_inside_the_square_root(ops):
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)  # mean 0, variance 1
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert ops.layer_norm(x, one, zero, eps=3.0).tolist() == [0.5, -0.5]
    assert ops.add_layer_norm(x, None, one, zero, eps=3.0).tolist() == [0.5, -0.5]


@BACKENDS
@ANY_DTYPE
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (5, 33), (2, 3, 40)], ids=str)
def test_linear_is_as_accurate_as_its_definition(ops, shape, bias, dtype, poisoned_memory):
    inputs = {"x": draw(0, *shape), "weight": draw(1, 11, shape[-1])} | ({"bias": draw(2, 11)} if bias else {})
    assert_as_accurate(ops.linear, lambda x, weight, bias=0.0: x @ weight.mT + bias, inputs, dtype)


@ANY_DTYPE
def test_products_computed_wide_are_a_projection(dtype, poisoned_memory):
    """The form for a CPU without 16-bit products, on any CPU; frozen weights or inputs get no gradient."""
    wide = cpu_ops._WideLinear.apply
    inputs = {"x": draw(0, 2, 3, 40), "weight": draw(1, 11, 40), "bias": draw(2, 11)}
    assert_as_accurate(wide, lambda x, weight, bias: x @ weight.mT + bias, inputs, dtype)
    x, weight = inputs["x"].to(dtype), inputs["weight"].to(dtype).requires_grad_()
    (alone,) = torch.autograd.grad(wide(x, weight, None).sum(), weight)
    (beside, _) = torch.autograd.grad(wide(x.requires_grad_(), weight, None).sum(), (weight, x))
    assert torch.equal(alone, beside)


@ANY_DTYPE
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_a_projection_of_a_few_rows_without_gradients_is_as_accurate_as_torchs(rows, dtype):
    """As in decoding; up to 16 rows 16-bit weights are read as they are, beyond that a wide copy is made of them."""
    x, weight, bias = (t.to(dtype) for t in (draw(0, rows, 40), draw(1, 11, 40), draw(2, 11)))
    truth = x.double() @ weight.double().mT + bias.double()
    with torch.no_grad():
        ours, theirs = cpu_ops.linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    ours, theirs = ((y.double() - truth).abs().max() for y in (ours, theirs))
    assert ours <= 2 * theirs + torch.finfo(dtype).eps * truth.abs().max()


@BACKENDS
def test_gradients_are_those_of_finite_differences(ops):
    def check(fn, *inputs):
        assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)

    shapes = [(2, 5, 6), (2, 5, 6), (6,), (6,), (4, 6), (4,)]
    x, residual, weight, bias, matrix, shift = (draw(i, *shape).requires_grad_() for i, shape in enumerate(shapes))
    check(ops.bias_gelu, x, bias)
    check(ops.layer_norm, x, weight, bias)
    check(ops.linear, x, matrix, shift)
    check(lambda x: ops.dropout(x, p=0.3, seed=SEED), x)
    for prenorm, p in itertools.product((True, False), (0.0, 0.3)):
        add_layer_norm = functools.partial(ops.add_layer_norm, dropout_p=p, seed=SEED, prenorm=prenorm)
        check(add_layer_norm, x, residual, weight, bias)
        check(lambda x, w, b, fn=add_layer_norm: fn(x, None, w, b), x, weight, bias)


@BACKENDS
@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    p=st.sampled_from([0.0, 0.4]),
    transposed=st.booleans(),
)
def test_any_shape_and_any_strides_will_do(ops, shape, p, transposed):
    def stored(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1) if transposed else x

    multiplier = multiplier_of(ops, p, *shape)
    inputs = {name: stored(x) for name, x in norm_inputs(*shape).items()}

    def everything(gelu, dropout, add_norm):
        def fn(x, weight, bias, residual):
            x, residual = stored(x), stored(residual)
            return gelu(x, bias), dropout(x), *add_norm(x, residual, weight, bias)

        return fn

    ours = everything(
        ops.bias_gelu,
        lambda x: ops.dropout(x, p=p, seed=SEED),
        lambda *t: ops.add_layer_norm(*t, dropout_p=p, seed=SEED, prenorm=True),
    )
    definition = everything(
        plain_gelu,
        lambda x: x * multiplier,
        lambda x, residual, weight, bias: plain_add_layer_norm(x, weight, bias, residual, multiplier=multiplier),
    )
    assert_equal_to_rounding(ours, definition, inputs)


@BACKENDS
@ANY_DTYPE
def test_dropout_scales_what_it_keeps_and_its_gradient_alike(ops, dtype, poisoned_memory):
    multiplier = multiplier_of(ops, 0.25, 6, 50)
    assert_as_accurate(
        lambda x: ops.dropout(x, p=0.25, seed=SEED), lambda x: x * multiplier.to(x.dtype), {"x": draw(0, 6, 50)}, dtype
    )


@BACKENDS
def test_without_dropout_nothing_is_computed(ops):
    x = torch.ones(3)
    assert ops.dropout(x, p=0.0, seed=None) is x


@BACKENDS
def test_no_mask_is_kept_for_the_backward_pass(ops):
    x, residual = (draw(i, 64, 100).float().requires_grad_() for i in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ops.dropout(x, p=0.5, seed=SEED)
    assert sum(kept) <= 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ops.add_layer_norm(x, residual, torch.ones(100), torch.zeros(100), dropout_p=0.5, seed=SEED)
    assert sum(kept) < 2 * x.numel(), "only the sum that is normalised and its statistics"


@BACKENDS
def test_a_second_derivative_is_refused_where_it_would_be_wrong(ops):
    """Gradients made by hand have no gradient of their own."""
    x, weight = draw(0, 4, 6).requires_grad_(), draw(1, 6).requires_grad_()
    q = draw(2, 1, 1, 4, 6).requires_grad_()
    functions = [
        lambda: ops.dropout(x, p=0.5, seed=SEED),
        lambda: ops.attention(q, q, q, dropout_p=0.5, seed=SEED),
        lambda: ops.linear_cross_entropy(x, weight[None], torch.zeros(4, dtype=torch.int64)),
    ]
    if ops is cpu_ops:
        functions.append(lambda: cpu_ops._WideLinear.apply(x, weight[None], None))
    for function in functions:
        leaf = q if function is functions[1] else x
        (slope,) = torch.autograd.grad(function().square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()
