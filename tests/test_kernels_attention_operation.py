"""Properties of the fused attention, and how it serves as an operation of torch."""

import pytest
import torch
from kernels_attention import KEYS, QUERIES, make_inputs, results, use_tiles
from kernels_common import assert_captured_by_a_graph, assert_serves_autograd

from megagpt_kernels import attention, attention_backward, packed_attention


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch)


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
