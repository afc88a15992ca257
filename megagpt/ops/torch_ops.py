"""The operations of a decoder in torch: the definition that every other backend is measured against.

B batch, T positions, D width, H heads, K = D / H width of one head, N rows, V vocabulary. ``seed`` is a 0-d int64
tensor on the data's device, or None without dropout: a mask is a function of (seed, position) alone, so it is made
again in a backward pass or a recomputed forward pass without any generator's state.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.ops.masks import HashedMasks, row_blocks
from megagpt.ops.torch_attention import attention
from megagpt.ops.torch_cross_entropy import linear_cross_entropy, weighted_cross_entropy

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_packer",
    "packed_attention",
    "weighted_cross_entropy",
    "why_not",
]


def why_not(*, head_width: int, dtype: torch.dtype, device: torch.device, asked_for: bool = True) -> str | None:
    """None: torch serves every head width, dtype and device."""
    return None


def packed_attention(
    qkv: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal ``attention`` of q, k and v side by side, (B, T, 3, H, K), as one projection gives them: (B, T, H, K)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return attention(q, k, v, dropout_p=dropout_p, seed=seed, scale=scale, cu_seqlens=cu_seqlens).transpose(1, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; x (..., D_in), weight (D_out, D_in), bias (D_out,)."""
    return F.linear(x, weight, bias)


def linear_packer(n_weights: int, *, rows: int, like: Tensor) -> Callable | None:
    """What makes of a weight the ``linear`` to use with it in inference, or None where ``linear`` itself is as good.

    For a model of ``n_weights`` weights like ``like``, which must not change any more, and up to ``rows`` rows at once.
    """
    return None


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of ``x + bias`` in its tanh form; x (..., D), bias (D,)."""
    return F.gelu(x + bias, approximate="tanh")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, with the biased variance; x (..., D)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class _DropoutAdd(torch.autograd.Function):
    """dropout(x) + residual, whose mask is made twice instead of being kept."""

    @staticmethod
    def forward(ctx, x, residual, p, seed, masks):
        ctx.save_for_backward(seed)
        ctx.p, ctx.masks, ctx.has_residual = p, masks, residual is not None
        return _multiply_add(x, masks, seed, p, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (seed,) = ctx.saved_tensors
        dx = _multiply_add(d_out, ctx.masks, seed, ctx.p)
        return dx, d_out if ctx.has_residual else None, None, None, None


def _multiply_add(x: Tensor, masks: type, seed: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """x times its mask, plus ``residual``, in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    mask = masks(seed, p, (1, *flat.shape))
    out = torch.empty_like(flat)
    for rows in row_blocks(*flat.shape, masks.block_elements):
        multiplier = mask(slice(None), rows, slice(None))[0]
        if residual is None:
            torch.mul(flat[rows], multiplier, out=out[rows])
        else:
            torch.addcmul(residual.reshape(flat.shape)[rows], flat[rows], multiplier, out=out[rows])
    return out.view(x.shape)


def dropout(x: Tensor, *, p: float, seed: Tensor | None, masks: type = HashedMasks) -> Tensor:
    """x with each element zero with probability p and the others scaled up, x (..., D); x itself for p = 0."""
    return _DropoutAdd.apply(x, None, p, seed, masks) if p else x


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    masks: type = HashedMasks,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of ``dropout(x) + residual``; with ``prenorm`` the pair (normalised, sum).

    x is what a sub-layer returned, residual (or None) the stream it adds to, both (..., D).
    """
    if dropout_p:
        x, residual = _DropoutAdd.apply(x, residual, dropout_p, seed, masks), None
    total = x if residual is None else x + residual
    normed = layer_norm(total, weight, bias, eps=eps)
    return (normed, total) if prenorm else normed
