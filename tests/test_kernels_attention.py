"""Attention of the fused kernels against ``megagpt.ops.torch_ops``, with tiles so small that several fit in a test."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_attention import DTYPES, KEYS, QUERIES, assert_as_accurate, check, make_inputs, results, use_tiles

from megagpt.ops import torch_ops
from megagpt.ops.masks import HashedMasks
from megagpt_kernels import attention, attention_forward, packed_attention


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch)


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


@pytest.mark.parametrize("K", [32, 64, 80])
def test_descriptors_change_nothing(K, device, monkeypatch):
    """Heads of 80, in two parts, and what lies off 16 bytes are loaded as without."""
    T, options = 45, {"dropout_p": 0.2, "seed": torch.tensor(3, device=device), "deterministic": True}
    options["cu_seqlens"] = torch.tensor([0, 13, T], device=device)
    qkv = torch.stack([x.transpose(1, 2) for x in make_inputs(2, 2, T, T, K, torch.float16, device)[:3]], 2)
    shifted = torch.empty(qkv.numel() + 1, dtype=qkv.dtype, device=device)[1:].view(qkv.shape).copy_(qkv)
    expected = packed_attention(qkv, **options)
    used = []
    launch = attention_forward.launch
    note = lambda *args, **kwargs: (used.append(kwargs.get("DESCRIPTORS")), launch(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr(attention_forward, "launch", note)
    use_tiles(monkeypatch, descriptors=True)
    assert torch.equal(packed_attention(qkv, **options), expected)
    assert torch.equal(packed_attention(shifted, **options), expected)
    assert [each for each in used if each is not None] == [K != 80, False]


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
