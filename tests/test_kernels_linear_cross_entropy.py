"""Output projection and cross-entropy in chunks: loss and both gradients, against torch in float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_captured_by_a_graph
from numerics import DTYPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megagpt_kernels.linear_cross_entropy import linear_cross_entropy

module = importlib.import_module("megagpt_kernels.linear_cross_entropy")  # the package has the function by this name
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def unfused(hidden, weight, targets, *, ignore_index=-100, z_loss=0.0):
    """What the operation is defined as, with all logits at once."""
    logits = F.linear(hidden, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counts = targets != ignore_index
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    return (losses + z_loss * logits.logsumexp(1) ** 2 * counts).sum() / counts.sum().clamp(min=1)


def make_inputs(N, D, V, dtype=torch.float32, device="cpu", ignored=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return hidden.to(device, dtype), (weight / D**0.5).to(device, dtype), targets.to(device)


def loss_and_gradients(function, hidden, weight, targets, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, targets, **options)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    return {"loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}


def assert_as_accurate(hidden, weight, targets, *, roundings=1, **options):
    """The error against float64 is at most twice that of torch's own operations in the same dtype.

    So many ``roundings`` of the largest value are always allowed.
    """
    ours = loss_and_gradients(linear_cross_entropy, hidden, weight, targets, **options)
    theirs = loss_and_gradients(unfused, hidden, weight, targets, **options)
    truth = loss_and_gradients(unfused, hidden.double(), weight.double(), targets, **options)
    assert ours["loss"].dtype == torch.float32
    for name in truth:
        assert name == "loss" or ours[name].dtype == hidden.dtype
        error = (ours[name].double() - truth[name]).abs().max().item()
        baseline = (theirs[name].double() - truth[name]).abs().max().item()
        floor = roundings * torch.finfo(ours[name].dtype).eps * truth[name].abs().max().item()
        assert error <= 2 * baseline + floor, f"{name}: error {error:.2e}, torch's own {baseline:.2e}"


@pytest.fixture
def small_blocks(monkeypatch):
    """Rows of more than 64 columns are read in blocks of 64, all but the last twice."""
    monkeypatch.setattr(module, "BLOCK", 64)


@pytest.fixture
def rows_at_once(monkeypatch):
    """A function that sets how many rows of V words a chunk has."""

    def limit(rows, V, dtype):
        monkeypatch.setattr(module, "BUFFER_BYTES", rows * 64 * -(-V // 64) * dtype.itemsize)
        monkeypatch.setattr(module, "EXTRA_BYTES", 0)

    return limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (9, 16, 33), (33, 40, 64), (16, 24, 129)], ids=str)
def test_loss_and_gradients_are_as_accurate_as_torch(shape, z_loss, dtype, device):
    assert_as_accurate(*make_inputs(*shape, dtype, device, ignored=0.3), z_loss=z_loss)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [65, 128, 129, 257])
def test_rows_read_in_blocks_are_as_accurate_as_torch(V, dtype, device):
    assert_as_accurate(*make_inputs(5, 16, V, dtype, device, ignored=0.2), z_loss=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 11, 12])
def test_chunks_are_as_accurate_as_torch(rows, dtype, device, rows_at_once):
    rows_at_once(rows, 70, dtype)
    assert_as_accurate(*make_inputs(12, 16, 70, dtype, device, ignored=0.3), z_loss=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_gradients_take_no_more_than_they_may(dtype):
    for N in (1, 100, 5000, 32768, 1_000_003):
        for V in (1, 256, 40478, 50257, 250_000):
            for gradients in (0, 200 * 10**6, 10**9):
                rows = module._rows_of_a_chunk(N, V, dtype.itemsize, gradients)
                logits = rows * 64 * -(-V // 64) * dtype.itemsize
                assert logits + gradients <= 512 * 10**6 or logits <= 256 * 10**6
                assert rows >= min(N, 128)
                assert rows % 128 == 0


def test_chunks_of_gpt2_are_whole_tiles_of_even_size():
    # Gradients: 32768 * 768 * 2 + 50257 * 768 * 4 = 204.7e6. They leave 307.3e6 / (50304 * 2) = 3054 rows, 23 tiles of
    # 128, and so 12 chunks, of 2730.7 rows or 22 tiles.
    assert module._rows_of_a_chunk(32768, 50257, 2, 204_721_152) == 22 * 128


class Allocations(TorchDispatchMode):
    """The largest storage that any operation returned, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


def test_the_logits_of_all_rows_never_exist(device, rows_at_once):
    N, D, V = 40, 4, 128
    rows_at_once(8, V, torch.float32)
    inputs = make_inputs(N, D, V, device=device)
    with Allocations() as theirs:
        unfused(*inputs)
    with Allocations() as ours:
        module._forward(*inputs, -100, 0.0, True, True)
    assert theirs.largest == 4 * N * V
    assert ours.largest == 4 * 8 * V


def test_ignored_rows_have_no_gradient_and_no_weight_in_the_mean(device):
    hidden, weight, targets = make_inputs(10, 8, 21, device=device, ignored=0.5)
    counts = targets >= 0
    assert 0 < counts.sum() < 10
    ours = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    alone = loss_and_gradients(linear_cross_entropy, hidden[counts], weight, targets[counts])
    assert not ours["d_hidden"][~counts].any()
    torch.testing.assert_close(ours["loss"], alone["loss"])
    torch.testing.assert_close(ours["d_hidden"][counts], alone["d_hidden"])
    torch.testing.assert_close(ours["d_weight"], alone["d_weight"])


def test_an_ignored_row_is_ignored_whatever_it_holds(device):
    hidden, weight, targets = make_inputs(4, 8, 21, device=device)
    targets[2] = 7
    hidden[2] = torch.nan
    ours = loss_and_gradients(linear_cross_entropy, hidden, weight, targets.where(targets != 7, -1), ignore_index=-1)
    assert ours["loss"].isfinite()
    assert not ours["d_hidden"][2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_every_target_is_ignored_loss_and_gradients_are_zero(dtype, device):
    hidden, weight, targets = make_inputs(3, 8, 21, dtype, device, ignored=1.1)
    for value in loss_and_gradients(linear_cross_entropy, hidden, weight, targets, z_loss=0.1).values():
        assert torch.equal(value, torch.zeros_like(value))


def test_no_rows_give_zeros(device):
    hidden, weight, targets = make_inputs(0, 8, 21, device=device)
    result = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    assert result["loss"] == 0
    assert result["d_hidden"].shape == (0, 8)
    assert torch.equal(result["d_weight"], torch.zeros_like(weight))


@pytest.mark.parametrize("wrong", [-1, -101, 21, 2**40])
def test_a_target_outside_of_the_vocabulary_is_refused(wrong, device):
    if device != "cpu":
        pytest.skip("on a GPU this stops the device for every test that follows")
    hidden, weight, targets = make_inputs(4, 8, 21, device=device)
    targets[1] = wrong
    with pytest.raises(RuntimeError, match="outside of the vocabulary of 21"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_of_32_bits_and_any_strides_give_the_same(dtype, device):
    hidden, weight, targets = make_inputs(6, 8, 21, dtype, device)
    plain = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    strided = loss_and_gradients(
        linear_cross_entropy,
        hidden.t().contiguous().t(),
        weight.t().contiguous().t(),
        targets.int().repeat(2, 1).t()[:, 0],
    )
    for name in plain:
        torch.testing.assert_close(strided[name], plain[name])


@pytest.mark.parametrize("size", [1e4, -1e4, 3e4])
def test_large_logits_neither_overflow_nor_become_nan(size, device):
    hidden, weight, targets = make_inputs(5, 2, 70, torch.float16, device)
    hidden[:, 0], weight[:, 0] = size, 1.0
    assert_as_accurate(hidden, weight, targets)
    assert all(
        value.isfinite().all() for value in loss_and_gradients(linear_cross_entropy, hidden, weight, targets).values()
    )


@pytest.mark.usefixtures("small_blocks")
def test_a_vocabulary_masked_by_infinities_leaves_the_rest_as_it_was(device):
    """A whole block of minus infinity has no largest logit to subtract."""
    hidden, weight, targets = make_inputs(3, 4, 150, device=device)
    targets %= 64
    hidden[:, 0] = 1.0
    masked = weight.clone()
    masked[64:, 0], masked[64:, 1:] = -torch.inf, 0.0
    loss = linear_cross_entropy(hidden, masked, targets)
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight[:64].contiguous(), targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_second_backward_pass_gives_the_same_gradients(dtype, device):
    hidden, weight, targets = make_inputs(6, 8, 21, dtype, device)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_multiplied_by_the_one_that_arrives(dtype, device):
    inputs = make_inputs(6, 8, 21, dtype, device)
    once = loss_and_gradients(linear_cross_entropy, *inputs)
    scaled = loss_and_gradients(lambda *a: linear_cross_entropy(*a) * -8, *inputs)  # exact in any dtype
    assert torch.equal(scaled["d_hidden"], once["d_hidden"] * -8)
    assert torch.equal(scaled["d_weight"], once["d_weight"] * -8)


def test_float16_keeps_the_gradients_of_improbable_words(device):
    """As a part of a mean, or as a plain probability, e^-18 is nothing in float16; times the loss scale it is 1e-3."""
    N, V = 4, 33
    hidden = torch.ones(N, 1, dtype=torch.float16, device=device)
    weight = torch.full((V, 1), -18.0, dtype=torch.float16, device=device)
    weight[0] = 0.0
    targets = torch.zeros(N, dtype=torch.int64, device=device)
    d_weight = loss_and_gradients(lambda *a: linear_cross_entropy(*a) * 2.0**16, hidden, weight, targets)["d_weight"]
    p = torch.tensor(-18.0, dtype=torch.float64).exp()  # the sum of all is 1 to 1e-6
    torch.testing.assert_close(d_weight[1:].double().cpu(), (p * 2**16).expand(V - 1, 1), rtol=2e-2, atol=0)


@pytest.mark.parametrize("needed", ["hidden", "weight"])
def test_one_gradient_is_computed_without_the_other(needed, device):
    hidden, weight, targets = make_inputs(6, 8, 21, device=device)
    both = loss_and_gradients(linear_cross_entropy, hidden, weight, targets)
    wanted = {"hidden": hidden, "weight": weight}[needed].requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(loss, wanted)
    assert torch.equal(gradient, both[f"d_{needed}"])
    assert torch.equal(loss, both["loss"])


def test_without_need_no_gradient_is_computed(device):
    hidden, weight, targets = make_inputs(6, 8, 21, device=device)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
        loss_alone, *gradients, _ = module._forward(hidden, weight, targets, -100, 0.0, False, False)
    assert not loss.requires_grad
    assert all(gradient.numel() == 0 for gradient in gradients)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, targets).detach())
    assert torch.equal(loss, loss_alone)


def test_a_recomputed_loss_has_the_same_gradients(device):
    inputs = make_inputs(6, 8, 21, device=device)
    plain = loss_and_gradients(linear_cross_entropy, *inputs)
    again = loss_and_gradients(lambda *a: checkpoint(linear_cross_entropy, *a, use_reentrant=False), *inputs)
    assert all(torch.equal(again[name], plain[name]) for name in plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_torch_accepts_the_operation(needs, device):
    hidden, weight, targets = make_inputs(6, 8, 21, device=device)
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    args = (hidden, weight, targets, -100, 1e-3, *needs)
    torch.library.opcheck(module._linear_cross_entropy, args)


def test_torch_accepts_the_operation_that_scales_gradients(device):
    gradient, one = torch.ones(3, 5, device=device), torch.ones((), device=device)
    for dtype in DTYPES:
        torch.library.opcheck(module._scaled, (one, one, gradient, dtype))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_graph_is_whole_and_gives_the_same(device):
    inputs = make_inputs(6, 8, 21, device=device, ignored=0.2)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    plain = loss_and_gradients(linear_cross_entropy, *inputs, z_loss=1e-3)
    graph = loss_and_gradients(compiled, *inputs, z_loss=1e-3)
    assert all(torch.equal(graph[name], plain[name]) for name in plain)


@settings(max_examples=25, deadline=None)
@given(
    N=st.integers(1, 12),
    D=st.integers(1, 20),
    V=st.integers(1, 150),
    block=st.sampled_from([16, 64, 256]),
    rows=st.integers(1, 12),
    ignored=st.sampled_from([0.0, 0.5]),
    z_loss=st.sampled_from([0.0, 0.1]),
)
def test_any_shape_is_as_accurate_as_torch(device, N, D, V, block, rows, ignored, z_loss):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        patch.setattr(module, "EXTRA_BYTES", 0)
        patch.setattr(module, "BUFFER_BYTES", rows * 64 * -(-V // 64) * 4)
        # Of few short sums it is luck whose are rounded worse; what a wrong shape does is larger by far.
        inputs = make_inputs(N, D, V, device=device, ignored=ignored)
        assert_as_accurate(*inputs, z_loss=z_loss, roundings=8)


def test_a_cuda_graph_repeats_it(device):
    if device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    hidden, weight, targets = make_inputs(300, 64, 1000, torch.float16, device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    assert_captured_by_a_graph(lambda *inputs: (linear_cross_entropy(*inputs, targets),), leaves)
