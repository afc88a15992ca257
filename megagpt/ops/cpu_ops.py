"""The operations of ``torch_ops`` in forms that are faster on a CPU; same signatures, same results to rounding.

Two facts decide here. A CPU without 16-bit arithmetic emulates it: products are then computed in float32 from 16-bit
tensors. And random bits are slow, so dropout reads its masks from a pool.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.ops import torch_ops
from megagpt.ops.masks import PooledMasks, row_blocks
from megagpt.ops.precision import product_dtype
from megagpt.ops.torch_ops import layer_norm, linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "dropout",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "packed_attention",
    "why_not",
]


def why_not(*, head_width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why these forms cannot serve such a model, or None."""
    return None if device.type == "cpu" else f"its forms are for a CPU, and the model is on {device.type}"


class _WideLinear(torch.autograd.Function):
    """A projection of 16-bit tensors whose three products are computed in float32."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows, dy = (t.float().reshape(-1, t.shape[-1]) for t in (x, dy))
        dx = (dy @ weight.float()).to(x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None
        dw = (dy.mT @ rows).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.sum(0).to(weight.dtype) if ctx.has_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch_ops.linear``."""
    if product_dtype(x) == x.dtype:
        return F.linear(x, weight, bias)
    return _WideLinear.apply(x, weight, bias)


dropout = partial(torch_ops.dropout, masks=PooledMasks)
add_layer_norm = partial(torch_ops.add_layer_norm, masks=PooledMasks)


def attention(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, **options) -> Tensor:
    """``torch_ops.attention``."""
    if dropout_p or product_dtype(q) == q.dtype:
        return torch_ops.attention(q, k, v, dropout_p=dropout_p, masks=PooledMasks, **options)
    return torch_ops.attention(q.float(), k.float(), v.float(), **options).to(q.dtype)


def packed_attention(qkv: Tensor, **options) -> Tensor:
    """``torch_ops.packed_attention``."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return attention(q, k, v, **options).transpose(1, 2)


_SLOPE, _CUBE = 2 * 0.7978845608028654, 0.044715  # GELU(u) = u sigmoid(_SLOPE (u + _CUBE u^3)); sqrt(2 / pi)
_BLOCK = 1 << 16  # elements; a block and its three buffers stay in a core's cache


class _BiasGelu(torch.autograd.Function):
    """torch's GELU spends most of its time on tanh, twice; here its derivative is kept in place of its input.

    With z = _SLOPE (u + _CUBE u^3) and s = sigmoid(z): GELU' = s + u z' s (1 - s), and u z' = 3 z - 2 _SLOPE u.
    """

    @staticmethod
    def forward(ctx, x, bias):
        flat = x.reshape(-1, x.shape[-1])
        y, slope = torch.empty_like(flat), torch.empty_like(flat)
        blocks = row_blocks(*flat.shape, _BLOCK)
        wide = torch.promote_types(x.dtype, torch.float32)
        buffers = torch.empty(3, *flat[blocks[0]].shape, dtype=wide)
        constant = torch.full(bias.shape, _SLOPE, dtype=wide)
        for rows in blocks:
            u, z, s = buffers[:, : rows.stop - rows.start]
            torch.add(flat[rows], bias, out=u)
            torch.addcmul(constant, u, u, value=_SLOPE * _CUBE, out=z).mul_(u)
            torch.sigmoid(z, out=s)
            torch.mul(u, s, out=y[rows])
            z.sub_(u, alpha=_SLOPE * 2 / 3)
            torch.ops.aten.sigmoid_backward.grad_input(z, s, grad_input=z)
            torch.add(s, z, alpha=3.0, out=slope[rows])
        ctx.save_for_backward(slope)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (slope,) = ctx.saved_tensors
        dx = dy * slope.view(dy.shape)
        return dx, dx.reshape(-1, dx.shape[-1]).sum(0)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``torch_ops.bias_gelu``."""
    return _BiasGelu.apply(x, bias)
