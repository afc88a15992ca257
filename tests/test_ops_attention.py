"""Attention of both backends against its definition, written out in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DTYPES, LargestTensor, assert_as_accurate, assert_equal_to_rounding, draw

from megagpt.ops import cpu_ops, torch_attention, torch_ops

BACKENDS = pytest.mark.parametrize("ops", [torch_ops, cpu_ops], ids=["torch", "cpu"])
SEED = torch.tensor(5)


@dataclass(frozen=True)
class Case:
    B: int
    H: int
    Tq: int
    Tkv: int
    K: int
    causal: bool = True
    p: float = 0.0
    scale: float | None = None
    cu_seqlens: tuple[int, ...] | None = None

    @property
    def options(self):
        cu_seqlens = None if self.cu_seqlens is None else torch.tensor(self.cu_seqlens)
        seed = SEED if self.p else None
        return {"causal": self.causal, "dropout_p": self.p, "seed": seed, "scale": self.scale, "cu_seqlens": cu_seqlens}

    def seen(self):
        """bool (Tq, Tkv), element by element."""
        begins = self.cu_seqlens or (0,)
        document = [sum(begin <= j for begin in begins) for j in range(self.Tkv)]
        offset = self.Tkv - self.Tq
        rows = [
            [(not self.causal or j <= i + offset) and document[i + offset] == document[j] for j in range(self.Tkv)]
            for i in range(self.Tq)
        ]
        return torch.tensor(rows)

    def inputs(self):
        shapes = {"q": self.Tq, "k": self.Tkv, "v": self.Tkv}
        return {n: draw(i, self.B, self.H, T, self.K) for i, (n, T) in enumerate(shapes.items())}


def definition(case, multiplier=None):
    seen, scale = case.seen(), case.K**-0.5 if case.scale is None else case.scale

    def attention(q, k, v):
        scores = (scale * (q @ k.mT)).masked_fill(~seen, -torch.inf)
        probs = scores.softmax(-1)
        return (probs if multiplier is None else probs * multiplier.to(q.dtype)) @ v

    return attention


def multiplier_of(ops, case, seed=SEED):
    """What the probabilities are multiplied with, (B, H, Tq, Tkv): equal scores and v = 1 show it."""
    q = torch.zeros(case.B, case.H, case.Tq, case.Tkv, dtype=torch.float64)
    k = torch.zeros(case.B, case.H, case.Tkv, case.Tkv, dtype=torch.float64)
    v = torch.eye(case.Tkv, dtype=torch.float64).expand_as(k)
    return ops.attention(q, k, v, **{**case.options, "seed": seed}) * case.seen().sum(1, keepdim=True)


CASES = [
    Case(1, 1, 1, 1, 4),
    Case(2, 3, 7, 7, 5),
    Case(2, 2, 129, 129, 8),
    Case(2, 2, 3, 40, 4),
    Case(1, 2, 9, 6, 4, causal=False),
    Case(1, 2, 33, 33, 16, scale=0.7),
    Case(2, 1, 20, 20, 6, cu_seqlens=(0, 1, 8, 20)),
    Case(1, 2, 4, 20, 6, cu_seqlens=(0, 9, 18, 20)),
    Case(1, 2, 11, 11, 6, causal=False, cu_seqlens=(0, 4, 11)),
    Case(2, 2, 1, 1, 4, p=0.2),
    Case(2, 3, 7, 7, 5, p=0.2),
    Case(1, 2, 300, 300, 16, p=0.1),
    Case(1, 2, 129, 129, 64, p=0.1),
    Case(2, 2, 3, 40, 4, p=0.3),
    Case(1, 2, 140, 150, 8, p=0.1),
    Case(1, 2, 9, 6, 4, causal=False, p=0.3),
    Case(1, 2, 33, 33, 16, scale=0.7, p=0.2),
    Case(1, 2, 150, 150, 6, p=0.2, cu_seqlens=(0, 1, 70, 150)),
    Case(1, 2, 4, 20, 6, p=0.2, cu_seqlens=(0, 9, 18, 20)),
]


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_as_accurate_as_its_definition(ops, case, dtype, poisoned_memory):
    multiplier = multiplier_of(ops, case) if case.p else None
    ours = lambda q, k, v: ops.attention(q, k, v, **case.options)  # noqa: E731
    assert_as_accurate(ours, definition(case, multiplier), case.inputs(), dtype)


@BACKENDS
@pytest.mark.parametrize("case", [case for case in CASES if case.Tq < 10], ids=str)
def test_gradients_are_those_of_finite_differences(ops, case):
    inputs = [x.requires_grad_() for x in case.inputs().values()]
    assert torch.autograd.gradcheck(lambda q, k, v: ops.attention(q, k, v, **case.options), inputs, fast_mode=True)


@st.composite
def cases(draw_):
    Tkv = draw_(st.integers(1, 40))
    Tq = draw_(st.one_of(st.just(Tkv), st.integers(1, Tkv)))
    cuts = draw_(st.sets(st.integers(1, 40)))
    cu_seqlens = (0, *sorted(cut for cut in cuts if cut < Tkv), Tkv)
    return Case(
        B=draw_(st.integers(1, 3)),
        H=draw_(st.integers(1, 3)),
        Tq=Tq,
        Tkv=Tkv,
        K=draw_(st.integers(1, 9)),
        causal=draw_(st.booleans()),
        p=draw_(st.sampled_from([0.0, 0.25])),
        scale=draw_(st.sampled_from([None, 0.3])),
        cu_seqlens=draw_(st.sampled_from([None, cu_seqlens])),
    )


@BACKENDS
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_attention_is_its_definition_for_any_shape(ops, case):
    multiplier = multiplier_of(ops, case) if case.p else None
    ours = lambda q, k, v: ops.attention(q, k, v, **case.options)  # noqa: E731
    assert_equal_to_rounding(ours, definition(case, multiplier), case.inputs())


@BACKENDS
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_packed_projection_need_no_copy(ops, p, dtype, poisoned_memory):
    """As the model calls it: q, k and v are slices of (B, T, 3, H, K), the result is read as (B, T, H K)."""
    B, T, H, K = 2, 37, 3, 8
    case = Case(B, H, T, T, K, p=p)
    multiplier = multiplier_of(ops, case) if p else None

    def on_packed(attention):
        def fn(qkv):
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
            return attention(q, k, v).transpose(1, 2).reshape(B, T, H * K)

        return fn

    ours = on_packed(lambda q, k, v: ops.attention(q, k, v, **case.options))
    assert_as_accurate(ours, on_packed(definition(case, multiplier)), {"qkv": draw(3, B, T, 3, H, K)}, dtype)


@BACKENDS
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_later_changes_nothing_at_all(ops, p, dtype):
    case, t = Case(2, 2, 150, 150, 8, p=p), 131
    q, k, v = (x.to(dtype).requires_grad_() for x in case.inputs().values())
    before = ops.attention(q, k, v, **case.options)
    gradients = torch.autograd.grad(before[:, :, :t].float().square().sum(), (q, k, v))
    assert all((gradient[:, :, t:] == 0).all() for gradient in gradients)
    with torch.no_grad():
        for x in (q, k, v):
            x[:, :, t:] = 100.0
    after = ops.attention(q, k, v, **case.options)
    assert torch.equal(before[:, :, :t], after[:, :, :t])
    assert not torch.equal(before[:, :, t:], after[:, :, t:])


@BACKENDS
def test_documents_see_nothing_of_each_other(ops):
    """Packed side by side they give what each gives alone."""
    lengths, cu_seqlens = (3, 1, 9), (0, 3, 4, 13)
    packed = Case(2, 2, 13, 13, 4, cu_seqlens=cu_seqlens)
    q, k, v = packed.inputs().values()
    together = ops.attention(q, k, v, **packed.options)
    alone = [ops.attention(*parts) for parts in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, 2))


@BACKENDS
def test_a_permuted_batch_gives_the_permuted_result(ops):
    case, order = Case(5, 2, 30, 30, 8), torch.tensor([3, 0, 4, 1, 2])
    q, k, v = (x.float() for x in case.inputs().values())
    assert torch.equal(ops.attention(q, k, v)[order], ops.attention(q[order], k[order], v[order]))


@BACKENDS
def test_queries_after_the_last_key_are_refused(ops):
    case = Case(1, 1, 3, 2, 4)
    with pytest.raises(ValueError, match="3 queries"):
        ops.attention(*case.inputs().values())


@BACKENDS
@pytest.mark.parametrize(("T", "K"), [(60, 64), (600, 4)])
def test_probabilities_are_dropped_at_the_given_rate(ops, T, K):
    case = Case(2, 4, T, T, K, p=0.15)
    multiplier = multiplier_of(ops, case)
    n = 8 * T * (T + 1) // 2
    kept = (multiplier > 0).sum().item() / n
    assert kept == pytest.approx(0.85, abs=5 * (0.85 * 0.15 / n) ** 0.5 + 1e-3 * (ops is cpu_ops))
    torch.testing.assert_close(multiplier[multiplier > 0].min(), multiplier.max())
    assert multiplier.max().item() == pytest.approx(1 / 0.85, rel=1e-3)


@BACKENDS
def test_a_seed_gives_one_mask_and_heads_have_their_own(ops):
    case = Case(2, 2, 50, 50, 8, p=0.5)
    masks = multiplier_of(ops, case) > 0
    assert torch.equal(masks, multiplier_of(ops, case) > 0)
    others = [multiplier_of(ops, case, seed=torch.tensor(6)) > 0, masks.flip(0), masks.flip(1)]
    seen = case.seen().expand_as(masks)
    for other in others:
        assert (masks == other)[seen].double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_defining_mask_does_not_depend_on_how_the_work_is_cut(monkeypatch):
    case = Case(2, 3, 70, 70, 4, p=0.3)
    inputs = case.inputs().values()
    whole = torch_ops.attention(*inputs, **case.options)
    monkeypatch.setattr(torch_attention, "_QUERIES", 9)
    monkeypatch.setattr(torch_attention, "_CPU_SCORES", 2 * 9 * 70)
    torch.testing.assert_close(torch_ops.attention(*inputs, **case.options), whole)


@BACKENDS
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_memory_is_linear_in_the_length(ops, p):
    """No T x T matrix is made, let alone kept for the backward pass."""
    case = Case(1, 1, 2000, 2000, 8, p=p)
    q, k, v = (x.float().requires_grad_() for x in case.inputs().values())
    ops.attention(q, k, v, **case.options)  # makes the constant pool that a CPU's masks are read from
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        ops.attention(q, k, v, **case.options).sum().backward()
    assert sum(kept) < 2000 * 2000 / 8
    assert largest.elements < 2000 * 2000 / 8
