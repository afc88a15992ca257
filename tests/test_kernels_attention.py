"""Attention of the fused kernels against ``megagpt.ops.torch_ops``, with tiles so small that several fit in a test."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_common import assert_captured_by_a_graph, assert_serves_autograd

from megagpt.ops import torch_ops
from megagpt.ops.masks import HashedMasks
from megagpt_kernels import attention, attention_backward, attention_tiles, packed_attention
from megagpt_kernels.attention_tiles import Tile

QUERIES, KEYS = 16, 32
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def use_tiles(monkeypatch, queries=QUERIES, keys=KEYS):
    monkeypatch.setattr(attention_tiles, "choose", lambda *_, **__: Tile(queries, keys, warps=4, stages=1))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch)


def make_inputs(B, H, Tq, Tkv, K, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v and the gradient of the output, which lies in memory as a projection's gradient does."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, Tq, H, K), (B, Tkv, H, K), (B, Tkv, H, K), (B, Tq, H, K)
    return [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes]


def results(function, q, k, v, dout, dtype=None, **options):
    """The output and the gradients of ``function``."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def assert_as_accurate(ours, theirs, truth, factor=2.0):
    """Errors are compared, not values: ours against float64 may be ``factor`` times torch's in the same dtype.

    Where the truth is 0, as dq and dk for a single token, a sum in float32 of larger terms that cancel remains.
    """
    cancelled = 4 * torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in truth.values())
    for name in truth:
        error = (ours[name].double() - truth[name]).abs().max().item()
        baseline = (theirs[name].double() - truth[name]).abs().max().item()
        floor = torch.finfo(ours[name].dtype).eps * truth[name].abs().max().item() + cancelled
        assert error <= factor * baseline + floor, f"{name}: error {error:.2e}, torch's own {baseline:.2e}"


def check(inputs, deterministic=False, **options):
    assert_as_accurate(
        ours=results(attention, *inputs, **options, deterministic=deterministic),
        theirs=results(torch_ops.attention, *inputs, **options),
        truth=results(torch_ops.attention, *inputs, **options, dtype=torch.float64),
    )


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
@pytest.mark.parametrize("T", [1, QUERIES, QUERIES + 1, KEYS + 1, 70])
def test_results_are_as_accurate_as_torch(T, deterministic, dtype, device):
    check(make_inputs(1, 2, T, T, 32, dtype, device), deterministic)


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@pytest.mark.parametrize("K", [64, 80, 96, 128, 256])
def test_heads_of_any_width_are_as_accurate_as_torch(K, dtype, device):
    inputs = make_inputs(1, 1, 40, 40, K, dtype, device)
    for deterministic in (False, True):
        check(inputs, deterministic)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [(1, 33), (20, 45), (45, 20)], ids=str)
def test_queries_are_the_last_positions(lengths, causal, dropout_p, deterministic, device):
    Tq, Tkv = lengths
    q, k, v, dout = make_inputs(1, 2, Tq, Tkv, 32, device=device)
    seed = torch.tensor(3, device=device)
    if Tq <= Tkv or not causal:
        check((q, k, v, dout), deterministic, causal=causal, dropout_p=dropout_p, seed=seed)
        return
    ours = results(attention, q, k, v, dout, deterministic=deterministic)
    first = Tq - Tkv  # the queries before it see nothing
    assert torch.equal(ours["out"][:, :, :first], torch.zeros_like(q[:, :, :first]))
    assert torch.equal(ours["dq"][:, :, :first], torch.zeros_like(q[:, :, :first]))
    ours |= {name: ours[name][:, :, first:] for name in ("out", "dq")}
    rest = q[:, :, first:], k, v, dout[:, :, first:]
    truth = results(torch_ops.attention, *rest, dtype=torch.float64)
    assert_as_accurate(ours, results(torch_ops.attention, *rest), truth)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in numpy, for pairs that do not see each other
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_scores_of_any_size_give_no_nan(scale, device):
    check(make_inputs(1, 1, 40, 40, 32, device=device), scale=scale)


def test_strided_inputs_are_read_where_they_lie(device):
    """Around them lies NaN, in all directions, so that an element read from elsewhere shows."""
    T, K = 40, 80
    inputs = make_inputs(2, 2, T, T, K, device=device)
    expected = results(attention, *inputs, deterministic=True)

    def surrounded(x):
        around = torch.full((2, 2, T + 3, K + 16), torch.nan, device=device)
        inside = around[:, :, 1 : T + 1, 8 : K + 8]
        return inside.copy_(x)

    def last_axis_strided(x):
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    for layout in (surrounded, last_axis_strided):
        moved = [layout(x) for x in inputs]
        strides = moved[0].stride()
        leaves = [x.requires_grad_() for x in moved[:3]]
        out = attention(*leaves, deterministic=True)
        grads = torch.autograd.grad(out, leaves, moved[3])
        assert leaves[0].stride() == strides
        for name, ours in zip(expected, (out, *grads), strict=True):
            assert torch.equal(ours, expected[name]), name


def test_the_output_lies_as_the_next_projection_reads_it(device):
    q, k, v, _ = make_inputs(2, 3, 5, 5, 32, device=device)
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


# --- documents


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", [(70, 70), (20, 70)], ids=str)
@pytest.mark.parametrize(
    "starts", [[0, 70], [0, 1, 2, 40, 40, 40, 70], [0, 0, 32, 64, 70, 70], [0, 5, 20, 70]], ids=str
)
def test_documents_do_not_see_each_other(starts, lengths, causal, deterministic, device):
    inputs = make_inputs(1, 1, *lengths, 32, device=device)
    cu_seqlens = torch.tensor(starts, device=device, dtype=torch.int32 if deterministic else torch.int64)
    seed = torch.tensor(1, device=device)
    dropout_p = 0.2 if causal else 0.0
    check(inputs, deterministic, causal=causal, cu_seqlens=cu_seqlens, dropout_p=dropout_p, seed=seed)


def test_more_documents_than_a_block_of_their_table(device):
    T = 300
    cu_seqlens = torch.arange(T + 1, device=device)
    q, k, v, _ = make_inputs(1, 1, T, T, 32, device=device)
    torch.testing.assert_close(attention(q, k, v, cu_seqlens=cu_seqlens), v)  # each position sees itself alone


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
def test_tiles_of_other_documents_are_not_read(deterministic, device):
    """0 * NaN is NaN: had a tile of the first document been read, the second would show it."""
    boundary, T = 2 * KEYS, 3 * KEYS + 5
    inputs = make_inputs(1, 1, T, T, 32, device=device)
    for x in inputs:
        x[:, :, :boundary] = torch.nan
    cu_seqlens = torch.tensor([0, boundary, T], device=device)
    ours = results(attention, *inputs, cu_seqlens=cu_seqlens, deterministic=deterministic)
    for name, x in ours.items():
        assert x[:, :, :boundary].isnan().all(), name
        assert x[:, :, boundary:].isfinite().all(), name


# --- dropout


def visible_mask(dropout_p, seed, B, H, T, K, device):
    """The multipliers of a dropout mask (B, H, T, T), from a product with the identity under equal probabilities."""
    q = torch.zeros(B, H, T, K, device=device)
    v = torch.eye(T, K, device=device).expand(B, H, T, K)
    return attention(q, q, v, causal=False, dropout_p=dropout_p, seed=seed)[..., :T] * T


@pytest.mark.parametrize("tiles", [(16, 16), (16, 32), (64, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_the_dropout_mask_is_the_definition_for_all_tiles(dropout_p, tiles, device, monkeypatch):
    use_tiles(monkeypatch, *tiles)
    B, H, T, seed = 2, 2, 45, torch.tensor(-7, device=device)
    everything = slice(None)
    expected = HashedMasks(seed, dropout_p, (B * H, T, T))(everything, everything, everything).view(B, H, T, T)
    torch.testing.assert_close(visible_mask(dropout_p, seed, B, H, T, 64, device), expected)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropped_elements_are_as_frequent_and_unrelated_as_chance(dropout_p, device, monkeypatch):
    use_tiles(monkeypatch, 64, 64)
    mask = visible_mask(dropout_p, torch.tensor(11, device=device), 4, 16, 64, 64, device)
    kept = (mask > 0.5).double()
    deviation = (kept - (1 - dropout_p)) / (dropout_p * (1 - dropout_p)) ** 0.5  # mean 0, variance 1
    four_sigma = 4 / deviation.numel() ** 0.5
    rows, columns = deviation[..., :-1, :] * deviation[..., 1:, :], deviation[..., :-1] * deviation[..., 1:]
    assert abs(deviation.mean()) < four_sigma
    assert abs(rows.mean()) < four_sigma
    assert abs(columns.mean()) < four_sigma
    assert abs((rows[..., :-1] * rows[..., 1:]).mean()) < four_sigma + 1e-3  # corners of a square, as masks.py says


@pytest.mark.usefixtures("poisoned_memory")
@DTYPES
@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
@pytest.mark.parametrize("K", [32, 80])
def test_with_dropout_results_are_those_of_torch_under_the_same_mask(K, deterministic, dtype, device):
    inputs = make_inputs(2, 1, 45, 45, K, dtype, device)
    check(inputs, deterministic, dropout_p=0.3, seed=torch.tensor(5, device=device))


# --- properties


def test_no_output_depends_on_later_tokens(device):
    T = 45
    q, k, v, _ = make_inputs(1, 2, T, T, 32, device=device)
    options = {"dropout_p": 0.1, "seed": torch.tensor(2, device=device)}
    before = attention(q, k, v, **options)
    for t in (0, 1, QUERIES - 1, QUERIES, KEYS, 37, T - 1):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t] += 1
        after = attention(*changed, **options)
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])


def test_a_permuted_batch_gives_permuted_results(device):
    inputs = make_inputs(3, 2, 40, 40, 32, device=device)
    order = torch.tensor([2, 0, 1], device=device)
    plain = results(attention, *inputs, deterministic=True)
    permuted = results(attention, *(x[order] for x in inputs), deterministic=True)
    for name, x in plain.items():
        assert torch.equal(permuted[name], x[order]), name


def test_the_order_of_heads_in_the_cache_changes_nothing(device, monkeypatch):
    inputs = make_inputs(2, 3, 40, 40, 32, device=device)
    together = results(attention, *inputs, deterministic=True)
    monkeypatch.setattr("megagpt_kernels.attention_parts._L2_SHARE", 4 * 2 * 40 * 32 * 4)  # 4 of 6 heads
    apart = results(attention, *inputs, deterministic=True)
    for name, x in together.items():
        assert torch.equal(apart[name], x), name


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_deterministic_gradient_has_the_same_bits_each_time(dropout_p, device):
    inputs = make_inputs(1, 2, 70, 70, 64, device=device)
    options = {"dropout_p": dropout_p, "seed": torch.tensor(2, device=device)}
    runs = [results(attention, *inputs, **options, deterministic=True) for _ in range(3)]
    fused = results(attention, *inputs, **options, deterministic=False)
    for name, x in runs[0].items():
        assert all(torch.equal(x, run[name]) for run in runs), name
        torch.testing.assert_close(fused[name], x)


def test_the_form_of_the_gradient_follows_torch(device, monkeypatch):
    inputs = make_inputs(1, 1, 40, 40, 32, device=device)
    names = []
    launch = attention_backward.launch
    monkeypatch.setattr(
        attention_backward,
        "launch",
        lambda kernel, *args, **kwargs: (names.append(kernel), launch(kernel, *args, **kwargs)),
    )
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for enabled in (True, False):
            torch.use_deterministic_algorithms(enabled)
            results(attention, *inputs)
            assert (attention_backward._dq_kernel in names) == enabled
            names.clear()
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "deterministic"])
def test_packed_results_are_those_of_the_parts(deterministic, device):
    B, T, H, K = 2, 40, 2, 80
    q, k, v, dout = make_inputs(B, H, T, T, K, device=device)
    options = {"dropout_p": 0.2, "seed": torch.tensor(4, device=device), "deterministic": deterministic, "scale": 0.2}
    options["cu_seqlens"] = torch.tensor([0, 13, T], device=device)
    expected = results(attention, q, k, v, dout, **options)
    qkv = torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4).contiguous().requires_grad_()
    out = packed_attention(qkv, **options)
    (dqkv,) = torch.autograd.grad(out, qkv, dout.transpose(1, 2))
    assert torch.equal(out, expected["out"].transpose(1, 2))
    assert dqkv.is_contiguous()
    parts = dict(zip(("dq", "dk", "dv"), dqkv.permute(2, 0, 3, 1, 4), strict=True))
    for name, x in parts.items():
        torch.testing.assert_close(x, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_memory_is_linear_in_the_length(device):
    def kept(T):
        sizes = []
        q, k, v, _ = make_inputs(1, 1, T, T, 32, device=device)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            attention(q.requires_grad_(), k, v, dropout_p=0.1, seed=torch.tensor(1, device=device))
        return sum(sizes)

    assert 0 < kept(64) == 2 * kept(32)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_is_as_accurate_as_torch(device, data):
    draw = data.draw
    B, H, Tq, Tkv = (draw(st.integers(1, n), label) for n, label in ((2, "B"), (2, "H"), (40, "Tq"), (40, "Tkv")))
    causal = draw(st.booleans(), "causal")
    Tq = min(Tq, Tkv)
    cuts = draw(st.none() | st.lists(st.integers(0, Tkv), max_size=4), "cuts")
    cu_seqlens = None if cuts is None else torch.tensor([0, *sorted(cuts), Tkv], device=device)
    dropout_p = draw(st.sampled_from([0.0, 0.2]), "dropout_p")
    inputs = make_inputs(B, H, Tq, Tkv, draw(st.sampled_from([32, 80]), "K"), device=device, seed=Tq)
    options = {"causal": causal, "dropout_p": dropout_p, "cu_seqlens": cu_seqlens}
    check(inputs, draw(st.booleans(), "deterministic"), **options, seed=torch.tensor(9, device=device))


# --- as an operation of torch


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_it_serves_autograd(dropout_p, device):
    seed = torch.tensor(1, device=device)
    cu_seqlens = torch.tensor([0, 7, 20], device=device)
    options = {"dropout_p": dropout_p, "seed": seed, "cu_seqlens": cu_seqlens, "deterministic": True}
    q, k, v, _ = make_inputs(1, 2, 20, 20, 32, device=device)
    qkv = torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4).contiguous()
    assert_serves_autograd(lambda *x: attention(*x, **options), [x.requires_grad_() for x in (q, k, v)])
    assert_serves_autograd(lambda x: packed_attention(x, **options), [qkv.requires_grad_()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_captures_it(device):
    qkv = torch.randn(2, 45, 3, 2, 64, device=device, requires_grad=True)
    seed = torch.tensor(1, device=device)
    assert_captured_by_a_graph(lambda x: (packed_attention(x, dropout_p=0.1, seed=seed, deterministic=True),), [qkv])


def test_a_gradient_without_strides_is_accepted(device):
    q, k, v, _ = (x.requires_grad_() for x in make_inputs(1, 2, 20, 20, 32, device=device))
    grads = torch.autograd.grad(attention(q, k, v, deterministic=True).sum(), (q, k, v))
    expected = torch.autograd.grad(attention(q, k, v, deterministic=True), (q, k, v), torch.ones_like(q))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("documents", [False, True])
def test_torch_accepts_the_operations(dropout_p, documents, device):
    q, k, v, _ = (x.requires_grad_() for x in make_inputs(1, 1, 20, 20, 32, device=device))
    qkv = torch.randn(1, 20, 3, 1, 32, device=device, requires_grad=True)
    seed = torch.tensor(1, device=device) if dropout_p else None
    cu_seqlens = torch.tensor([0, 7, 20], device=device) if documents else None
    ops = torch.ops.megagpt
    numbers = (dropout_p, 0.1, True)
    separate, packed = (q, k, v, seed, cu_seqlens, True, *numbers), (qkv, seed, cu_seqlens, *numbers)
    torch.library.opcheck(ops.attention.default, separate)
    torch.library.opcheck(ops.packed_attention.default, packed)
    with torch.no_grad():
        saved, packed_saved = ops.attention(*separate), ops.packed_attention(*packed)
        q, k, v, qkv = (x.detach() for x in (q, k, v, qkv))
        dout = torch.randn_like(qkv[:, :, 0])
        torch.library.opcheck(ops.attention_backward.default, (dout, q, k, v, *saved, True, *numbers))
        torch.library.opcheck(ops.packed_attention_backward.default, (dout, qkv, *packed_saved, *numbers))


def test_what_is_not_served_is_refused_with_the_reason(device):
    q, k, v, _ = make_inputs(1, 1, 4, 4, 48, device=device)
    with pytest.raises(ValueError, match="head width 48 is not one of 32, 64, 80, 96, 128, 256"):
        attention(q, k, v)
    q, k, v, _ = make_inputs(1, 1, 4, 4, 32, device=device)
    with pytest.raises(ValueError, match="not positive"):
        attention(q, k, v, scale=-1.0)
    with pytest.raises(ValueError, match="needs a seed"):
        attention(q, k, v, dropout_p=0.1)
