"""Causal attention in torch, with dropout on the probabilities."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.ops.torch_dropout import dropout


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
) -> Tensor:
    """softmax(scale * q k^T) v; q (B, H, Tq, K), k and v (B, H, Tkv, K)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    Tq, Tkv = q.shape[-2], k.shape[-2]
    if not dropout_p and cu_seqlens is None and (not causal or Tq == Tkv):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    scores = (q @ k.mT).float() * scale
    seen = torch.ones(Tq, Tkv, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(Tkv - Tq)
    scores = scores.masked_fill(~seen, float("-inf"))
    probs = dropout(scores.softmax(-1), p=dropout_p, seed=seed)
    return probs.to(v.dtype) @ v
