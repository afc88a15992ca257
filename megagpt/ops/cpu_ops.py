"""The operations of ``torch_ops`` in forms that are faster on a CPU; same signatures, same results to rounding.

Two facts decide here. A CPU without 16-bit arithmetic emulates it: products are then computed in float32 from 16-bit
tensors. And random bits are slow, so dropout reads its masks from a pool.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.ops import torch_ops
from megagpt.ops.masks import PooledMasks
from megagpt.ops.packed_linear import PackedLinear, can_pack
from megagpt.ops.precision import product_dtype
from megagpt.ops.torch_ops import bias_gelu, layer_norm, linear_cross_entropy, weighted_cross_entropy

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
    """The reason why these forms cannot serve such a model, or None."""
    return None if device.type == "cpu" else f"its forms are for a CPU, and the model is on {device.type}"


# Rows for which reading the weights takes longer than multiplying by them, as in decoding: to widen a copy of the
# weights for each product takes several times as long as emulated arithmetic.
_FEW_ROWS = 16


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
    few = x.numel() <= _FEW_ROWS * x.shape[-1] and not torch.is_grad_enabled()
    if few or product_dtype(x) == x.dtype:
        return F.linear(x, weight, bias)
    return _WideLinear.apply(x, weight, bias)


def linear_packer(n_weights: int, *, rows: int, like: Tensor) -> Callable | None:
    """``torch_ops.linear_packer``."""
    dtype = product_dtype(like)
    if dtype == torch.float16 or not can_pack(n_weights, rows=rows, dtype=dtype):
        return None
    return partial(PackedLinear, rows=rows, dtype=dtype, linear=linear)


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
