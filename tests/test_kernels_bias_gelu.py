"""The kernels of bias and GELU against the definition in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_captured_by_a_graph, assert_serves_autograd, gradients
from numerics import DTYPES, assert_as_accurate, draw

from megagpt.ops import torch_ops
from megagpt_kernels import bias_gelu

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ANY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SILENT = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # numpy's, of what a GPU does without a word


def check(inputs, dtype, device):
    inputs = {name: x.to(device) for name, x in inputs.items()}
    assert_as_accurate(bias_gelu, torch_ops.bias_gelu, inputs, dtype, gradient_factor=2)


@ANY_DTYPE
@pytest.mark.parametrize(
    "shape",
    [(1,), (5, 1), (1, 7), (70, 64), (2, 3, 768), (3, 1000), (5, 1025), (3, 2049), (9, 1536), (1, 1600)],
    ids=str,
)
def test_bias_gelu_is_as_accurate_as_torch(shape, dtype, device):
    check({"x": draw(0, *shape, std=2), "bias": draw(1, shape[-1])}, dtype, device)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=3), D=st.integers(16, 300), dtype=st.sampled_from(DTYPES))
def test_any_shape_will_do(shape, D, dtype, device):
    """At least 16 columns: the rounding of a single sum is luck."""
    check({"x": draw(0, *shape, D), "bias": draw(1, D)}, dtype, device)


def test_gelu_has_the_values_of_the_tanh_form(device):
    """The erf form differs from these by up to 4.7e-4."""
    x = torch.tensor([-3, -1, -0.5, 0.5, 1, 2.2, 3], device=device)
    golden = [-0.0036373921, -0.1588080094, -0.1542859902, 0.3457140098, 0.8411919906, 2.1696785270, 2.9963626079]
    y = bias_gelu(x - 0.25, torch.full((7,), 0.25, device=device))
    assert y.tolist() == pytest.approx(golden, abs=3e-7)


@SILENT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_is_finite_far_out(dtype, device):
    x = torch.tensor([-3e38, -1e4, -30.0, 0.0, 30.0, 1e4, 3e38], dtype=dtype, device=device, requires_grad=True)
    y = bias_gelu(x, torch.zeros(7, dtype=dtype, device=device))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x.clamp(min=0))
    assert slope.tolist() == [0, 0, 0, 0.5, 1, 1, 1]


@SILENT
def test_gelu_of_the_largest_half_is_finite(device):
    x = torch.tensor([-65504.0, 65504.0], dtype=torch.float16, device=device, requires_grad=True)
    y = bias_gelu(x, torch.zeros_like(x))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [0, 65504]
    assert slope.tolist() == [0, 1]


def test_slope_keeps_its_digits_where_the_gate_saturates(device):
    """1 - sigmoid(z) would have lost all of them at u = 4.5."""
    u = torch.linspace(-6, 6, 201, dtype=torch.float64, device=device)
    zero = torch.zeros_like(u)
    (exact,) = gradients(torch_ops.bias_gelu(u.requires_grad_(), zero), [u])
    single = u.detach().float().requires_grad_()
    (found,) = gradients(bias_gelu(single, zero.float()), [single])
    far = u.detach() < -3  # where the slope is nearly 0
    assert ((found - exact).abs()[far] <= 3e-5 * exact.abs()[far] + 1e-9).all()


def test_strides_do_not_matter(device):
    x = draw(0, 33, 5).to(device, torch.float32)
    bias = draw(1, 66).to(device, torch.float32)
    packed = [x.t().contiguous().requires_grad_(), bias[::2].contiguous().requires_grad_()]
    strided = [x.t().requires_grad_(), bias[::2].requires_grad_()]
    assert torch.equal(bias_gelu(*strided), bias_gelu(*packed))
    assert all(map(torch.equal, gradients(bias_gelu(*strided), strided), gradients(bias_gelu(*packed), packed)))
    (expanded,) = torch.autograd.grad(bias_gelu(*packed).sum(), packed[:1])  # the incoming gradient has stride 0
    (full,) = torch.autograd.grad(bias_gelu(*packed), packed[:1], torch.ones(5, 33, device=device))
    assert torch.equal(expanded, full)


def test_no_rows_have_no_gradient(device):
    x, bias = torch.ones(0, 6, device=device, requires_grad=True), torch.ones(6, device=device, requires_grad=True)
    y = bias_gelu(x, bias)
    _, d_bias = torch.autograd.grad(y.sum(), (x, bias))
    assert y.shape == (0, 6)
    assert d_bias.tolist() == [0] * 6


def test_bias_gelu_serves_autograd_in_every_way(device):
    leaves = [draw(0, 67, 40).float().to(device).requires_grad_(), draw(1, 40).float().to(device).requires_grad_()]
    assert_serves_autograd(bias_gelu, leaves)


def test_bias_gelu_is_registered_soundly(device):
    x, bias = draw(0, 3, 5).float().to(device).requires_grad_(), draw(1, 5).float().to(device).requires_grad_()
    torch.library.opcheck(torch.ops.megagpt.bias_gelu.default, (x, bias))
    torch.library.opcheck(torch.ops.megagpt.bias_gelu_backward.default, (x.detach(), x.detach(), bias.detach()))


def test_a_second_derivative_is_refused(device):
    x = torch.ones(3, device=device, requires_grad=True)
    (slope,) = torch.autograd.grad(bias_gelu(x, torch.zeros(3, device=device)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_a_cuda_graph_replays_bias_gelu(device):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    leaves = [draw(0, 67, 40).float().to(device).requires_grad_(), draw(1, 40).float().to(device).requires_grad_()]
    assert_captured_by_a_graph(lambda *t: (bias_gelu(*t),), leaves)
