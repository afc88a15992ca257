"""Attention in torch: torch's own fused form where it serves, otherwise one block of queries after another.

B batch, H heads, K width of one head, Tq and Tkv positions of queries and keys. With ``causal`` query i of Tq sees key
j of Tkv if j <= i + Tkv - Tq: queries are the last positions, as in decoding. Packed documents are given by
``cu_seqlens`` (n + 1,), the position where each begins and, last, T; they hold for every row of the batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.ops.masks import HashedMasks

_QUERIES = 128  # in a block: a quarter of the products at T=256 are causally masked and never computed
_CPU_SCORES = 1 << 18  # worked on at once on a CPU, so that they stay in the cores' caches
_KEPT_PER_WIDTH = 8  # probabilities are kept for the backward pass up to 8 K keys: no more than twice q, k, v and out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    masks: type = HashedMasks,
) -> Tensor:
    """dropout(softmax(scale * q k^T)) v for q (B, H, Tq, K), k and v (B, H, Tkv, K), any strides; (B, H, Tq, K).

    ``scale`` is 1/sqrt(K) unless given. ``masks`` gives the dropout masks of B * H matrices of Tq x Tkv elements.
    """
    Tq, Tkv = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if dropout_p:
        return _BlockedAttention.apply(q, k, v, seed, cu_seqlens, _Setting(causal, dropout_p, scale, masks))
    if cu_seqlens is None and (not causal or Tq == Tkv):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    seen = _seen(_documents(cu_seqlens, Tkv), slice(0, Tq), slice(0, Tkv), Tkv - Tq, causal, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


@dataclass(frozen=True)
class _Setting:
    causal: bool
    dropout_p: float
    scale: float
    masks: type


def _documents(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """The number of the document each position belongs to, (T,)."""
    if cu_seqlens is None:
        return None
    return torch.bucketize(torch.arange(T, device=cu_seqlens.device), cu_seqlens, right=True)


def _seen(documents, queries: slice, keys: slice, offset: int, causal: bool, device) -> Tensor:
    """bool (queries, keys): which query sees which key."""
    i = torch.arange(queries.start, queries.stop, device=device)[:, None] + offset
    j = torch.arange(keys.start, keys.stop, device=device)
    seen = j <= i if causal else (j >= 0).expand(len(i), -1)
    return seen if documents is None else seen & (documents[i] == documents[j])


class _Blocks:
    """How the work is cut: rows of the batch, and in them blocks of queries, each with the keys it may see."""

    def __init__(self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, causal: bool) -> None:
        self.B, self.H, self.Tq, _ = q.shape
        self.Tkv = k.shape[-2]
        self.causal = causal
        self.documents = _documents(cu_seqlens, self.Tkv)
        self.device = q.device
        scores = self.H * min(self.Tq, _QUERIES) * self.Tkv
        self.rows = max(1, _CPU_SCORES // scores) if q.device.type == "cpu" else self.B

    def batches(self) -> Iterator[slice]:
        return (slice(b, min(b + self.rows, self.B)) for b in range(0, self.B, self.rows))

    def queries(self) -> list[tuple[slice, slice, Tensor | None]]:
        """(queries, keys, bias of the last keys), the last queries, which see all keys, first."""
        return [self._block(slice(max(0, stop - _QUERIES), stop)) for stop in range(self.Tq, 0, -_QUERIES)]

    def _block(self, queries: slice) -> tuple[slice, slice, Tensor | None]:
        offset = self.Tkv - self.Tq
        keys = slice(0, queries.stop + offset if self.causal else self.Tkv)
        if not self.causal and self.documents is None:
            return queries, keys, None
        partly = slice(queries.start + offset if self.documents is None else 0, keys.stop)
        seen = _seen(self.documents, queries, partly, offset, self.causal, self.device)
        return queries, keys, torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, float("-inf"))


class _Work:
    """Some rows of the batch, as (rows * H, T, K) in the type that products are computed in; q is scaled."""

    def __init__(self, batch: slice, setting: _Setting, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.batch, self.n_head = batch, q.shape[1]
        self.heads = slice(batch.start * self.n_head, batch.stop * self.n_head)
        self.softmax_dtype = torch.promote_types(q.dtype, torch.float32)
        # 16-bit products are emulated on most CPUs, and slower than float32.
        self.dtype = self.softmax_dtype if q.device.type == "cpu" else q.dtype
        self.q = self.flat(q) * setting.scale
        self.k, self.v = self.flat(k), self.flat(v)

    def flat(self, x: Tensor) -> Tensor:
        return x[self.batch].to(self.dtype).flatten(0, 1)

    def probabilities(self, queries: slice, keys: slice, bias: Tensor | None) -> Tensor:
        scores = (self.q[:, queries] @ self.k[:, keys].mT).to(self.softmax_dtype)
        if bias is not None:
            scores[..., -bias.shape[1] :] += bias
        return scores.softmax(-1)

    def store(self, out: Tensor, positions: slice, value: Tensor) -> None:
        """out[batch, :, positions] = value (rows * H, positions, K)."""
        out[self.batch, :, positions] = value.unflatten(0, (-1, self.n_head))


class _BlockedAttention(torch.autograd.Function):
    """Attention with dropout on the probabilities: softmax in float32, memory linear in the length."""

    @staticmethod
    def forward(ctx, q, k, v, seed, cu_seqlens, setting):
        B, H, Tq, K = q.shape
        Tkv = k.shape[-2]
        mask = setting.masks(seed, setting.dropout_p, (B * H, Tq, Tkv))
        blocks = _Blocks(q, k, cu_seqlens, setting.causal)
        parts = blocks.queries()
        out = torch.empty(B, Tq, H, K, dtype=q.dtype, device=q.device).transpose(1, 2)
        kept = []
        for batch in blocks.batches():
            work = _Work(batch, setting, q, k, v)
            for queries, keys, bias in parts:
                probs = work.probabilities(queries, keys, bias)
                dropped = (probs * mask(work.heads, queries, keys)).to(work.dtype)
                work.store(out, queries, dropped @ work.v[:, keys])
                if Tkv <= _KEPT_PER_WIDTH * K:
                    kept.append(probs)
        ctx.save_for_backward(q, k, v, seed, cu_seqlens, *kept)
        ctx.setting = setting
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, seed, cu_seqlens, *kept = ctx.saved_tensors
        setting, kept = ctx.setting, iter(kept)
        blocks = _Blocks(q, k, cu_seqlens, setting.causal)
        parts = blocks.queries()
        mask = setting.masks(seed, setting.dropout_p, (blocks.B * blocks.H, blocks.Tq, blocks.Tkv))
        dq, dk, dv = _empty_gradients(q, k)
        for batch in blocks.batches():
            work = _Work(batch, setting, q, k, v)
            d_out3 = work.flat(d_out)
            dk3 = dv3 = None
            for queries, keys, bias in parts:
                probs = next(kept, None)
                if probs is None:
                    probs = work.probabilities(queries, keys, bias)
                multiplier = mask(work.heads, queries, keys)
                d_probs = (d_out3[:, queries] @ work.v[:, keys].mT).to(probs.dtype).mul_(multiplier)
                d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype).to(work.dtype)
                dropped = torch.mul(probs, multiplier, out=d_probs).to(work.dtype)
                work.store(dq, queries, (d_scores @ work.k[:, keys]).mul_(setting.scale))
                dk3 = _add_product(dk3, keys, d_scores.mT, work.q[:, queries])
                dv3 = _add_product(dv3, keys, dropped.mT, d_out3[:, queries])
            work.store(dk, slice(None), dk3)
            work.store(dv, slice(None), dv3)
        return dq, dk, dv, None, None, None


def _add_product(total: Tensor | None, keys: slice, a: Tensor, b: Tensor) -> Tensor:
    """total[:, keys] += a b; the first block of queries, which sees every key, begins the sum."""
    if total is None:
        return a @ b
    total[:, keys].baddbmm_(a, b)
    return total


def _empty_gradients(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Room for dq, dk, dv; side by side as in a packed projection (B, T, 3, H, K) where the lengths are equal."""
    B, H, Tq, K = q.shape
    if k.shape[-2] == Tq:
        return torch.empty(B, Tq, 3, H, K, dtype=q.dtype, device=q.device).permute(2, 0, 3, 1, 4).unbind()
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
