"""The operations of a decoder in plain torch: the definition that every other backend is measured against.

B batch, T positions, D width, H heads, K = D / H width of one head, N rows, V vocabulary. ``seed`` is a 0-d int64
tensor on the data's device, or None without dropout: the mask is a function of (seed, position) alone, so it can be
made again in a backward pass or a recomputed forward pass without any generator's state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.ops.torch_attention import attention
from megagpt.ops.torch_cross_entropy import linear_cross_entropy
from megagpt.ops.torch_dropout import dropout

__all__ = ["add_layer_norm", "attention", "bias_gelu", "dropout", "layer_norm", "linear_cross_entropy", "why_not"]


def why_not(*, head_width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """None: torch serves every head width, dtype and device."""
    return None


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of ``x + bias`` in its tanh form; x (..., D), bias (D,)."""
    return F.gelu(x + bias, approximate="tanh")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, with the biased variance; x (..., D)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of ``dropout(x) + residual``; with ``prenorm`` the pair (normalised, sum).

    x is what a sub-layer returned, residual (or None) the stream it adds to, both (..., D).
    """
    total = dropout(x, p=dropout_p, seed=seed)
    if residual is not None:
        total = total + residual
    normed = layer_norm(total, weight, bias, eps=eps)
    return (normed, total) if prenorm else normed
