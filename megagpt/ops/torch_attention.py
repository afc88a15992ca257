"""Attention in torch: torch's own fused form where it serves, otherwise one block of queries after another.

B batch, H heads, K width of one head, Tq and Tkv positions of queries and keys. With ``causal`` query i of Tq sees key
j of Tkv if j <= i + Tkv - Tq: queries are the last positions, as in decoding. Packed documents are given by
``cu_seqlens`` (n + 1,), the position where each begins and, last, T; they hold for every row of the batch.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    if Tq > Tkv and (causal or cu_seqlens is not None):
        raise ValueError(f"{Tq} queries cannot be the last of {Tkv} positions")
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
    """How the work is cut: B * H heads into groups, and in them the queries, each with the keys it may see."""

    def __init__(self, q: Tensor, k: Tensor, cu_seqlens: Tensor | None, setting: _Setting) -> None:
        """q (B * H, Tq, K), k (B * H, Tkv, K)."""
        self.n_heads, self.Tq, _ = q.shape
        self.Tkv = k.shape[1]
        self.causal, self.device = setting.causal, q.device
        self.documents = _documents(cu_seqlens, self.Tkv)
        self.mask_shape = (self.n_heads, self.Tq, self.Tkv)

    def heads(self) -> list[slice]:
        """As many as caches hold on a CPU, all elsewhere."""
        scores = min(self.Tq, _QUERIES) * self.Tkv
        step = max(1, _CPU_SCORES // scores) if self.device.type == "cpu" else self.n_heads
        return [slice(h, min(h + step, self.n_heads)) for h in range(0, self.n_heads, step)]

    def queries(self) -> list[tuple[slice, slice, Tensor | None]]:
        """(queries, keys, bias of the last keys), the last queries, which see all keys, first."""
        return [self._block(slice(max(0, stop - _QUERIES), stop)) for stop in range(self.Tq, 0, -_QUERIES)]

    def _block(self, queries: slice) -> tuple[slice, slice, Tensor | None]:
        offset = self.Tkv - self.Tq
        keys = slice(0, queries.stop + offset if self.causal else self.Tkv)
        if self.documents is None:
            return queries, keys, _causal_bias(queries.stop - queries.start, self.device) if self.causal else None
        return queries, keys, _bias(_seen(self.documents, queries, keys, offset, self.causal, self.device))


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


@functools.lru_cache(maxsize=16)
def _causal_bias(n: int, device: torch.device) -> Tensor:
    """What n queries add to their scores for the last n keys they may see."""
    return _bias(torch.ones(n, n, dtype=torch.bool, device=device).tril_())


class _BlockedAttention(torch.autograd.Function):
    """Attention with dropout on the probabilities: softmax in float32, memory linear in the length."""

    @staticmethod
    def forward(ctx, q, k, v, seed, cu_seqlens, setting):
        ctx.setting, ctx.shape, ctx.dtype = setting, q.shape, q.dtype
        wide = torch.promote_types(q.dtype, torch.float32)
        # 16-bit products are emulated on most CPUs, and slower than float32.
        product = wide if q.device.type == "cpu" else q.dtype
        q, k, v = (x.to(product).reshape(-1, *x.shape[-2:]) for x in (q, k, v))
        blocks = _Blocks(q, k, cu_seqlens, setting)
        mask = setting.masks(seed, setting.dropout_p, blocks.mask_shape)
        keep = k.shape[1] <= _KEPT_PER_WIDTH * k.shape[2]
        out, kept = torch.empty_like(q), []
        for heads in blocks.heads():
            for queries, keys, bias in blocks.queries():
                probs = _probabilities(q[heads, queries], k[heads, keys], setting.scale, bias, wide)
                dropped = (probs * mask(heads, queries, keys)).to(product)
                torch.bmm(dropped, v[heads, keys], out=out[heads, queries])
                if keep:
                    kept.append(probs)
        ctx.save_for_backward(q, k, v, seed, cu_seqlens, *kept)
        return _like_projection(out, ctx.shape, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, seed, cu_seqlens, *kept = ctx.saved_tensors
        setting, kept = ctx.setting, iter(kept)
        blocks = _Blocks(q, k, cu_seqlens, setting)
        mask = setting.masks(seed, setting.dropout_p, blocks.mask_shape)
        wide = torch.promote_types(q.dtype, torch.float32)
        d_out = d_out.to(q.dtype).reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for heads in blocks.heads():
            for queries, keys, bias in blocks.queries():
                probs = next(kept, None)
                if probs is None:
                    probs = _probabilities(q[heads, queries], k[heads, keys], setting.scale, bias, wide)
                multiplier = mask(heads, queries, keys)
                d_probs = (d_out[heads, queries] @ v[heads, keys].mT).to(wide).mul_(multiplier)
                d_scores = torch._softmax_backward_data(d_probs, probs, -1, wide).to(q.dtype)
                dropped = torch.mul(probs, multiplier, out=d_probs).to(q.dtype)
                torch.bmm(d_scores, k[heads, keys], out=dq[heads, queries])
                dk[heads, keys].baddbmm_(d_scores.mT, q[heads, queries], alpha=setting.scale)
                dv[heads, keys].baddbmm_(dropped.mT, d_out[heads, queries])
        return *_gradients(dq.mul_(setting.scale), dk, dv, ctx), None, None, None


def _probabilities(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """softmax(scale * q k^T + bias), the bias on the last keys."""
    # As a factor of the product the scale costs nothing, and in float16 it comes before the rounding.
    scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale).to(dtype)
    if bias is not None:
        scores[..., -bias.shape[1] :] += bias
    return scores.softmax(-1)


def _like_projection(x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """(B * H, T, K) as (B, H, T, K) in the order (B, T, H, K), which the output projection reads without a copy."""
    B, H, T, K = shape
    return torch.empty(B, T, H, K, dtype=dtype, device=x.device).transpose(1, 2).copy_(x.view(shape))


def _gradients(dq: Tensor, dk: Tensor, dv: Tensor, ctx) -> tuple[Tensor, ...]:
    """In the order of a packed projection (B, T, 3, H, K), side by side, where the lengths are equal."""
    B, H, Tq, K = ctx.shape
    shapes = (ctx.shape, (B, H, dk.shape[1], K), (B, H, dk.shape[1], K))
    grads = [g.view(shape) for g, shape in zip((dq, dk, dv), shapes, strict=True)]
    if dk.shape[1] != Tq:
        return tuple(g.to(ctx.dtype) for g in grads)
    packed = torch.empty(B, Tq, 3, H, K, dtype=ctx.dtype, device=dq.device).permute(2, 0, 3, 1, 4).unbind()
    return tuple(room.copy_(g) for room, g in zip(packed, grads, strict=True))
