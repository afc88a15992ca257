"""Attention, forward: softmax over a stream of key tiles (Dao 2023, arXiv 2307.08691), memory linear in the length.

Exponentials are powers of two with log2(e) folded into the scale. A query tile first takes the key tiles in which some
pairs don't see each other, then, without any mask, those in which all do.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megagpt_kernels import attention_tiles
from megagpt_kernels.attention_parts import (
    LOG2_E,
    WIDTHS,
    document_bounds,
    dot_nn,
    dot_nt,
    heads_in_group,
    load,
    of_head,
    place,
    scaled,
    seen_keys,
    store,
    tiles_of_keys,
    zeros,
)
from megagpt_kernels.masks import dropout_key_table, keep, threshold_and_scale
from megagpt_kernels.runtime import capability, launch

_LOWEST = tl.constexpr(-1e30)  # a start for running maxima; finite, so that a row that has seen nothing gives no NaN


@dataclass(frozen=True)
class Setting:
    """What is the same in the forward and the backward pass."""

    causal: bool
    dropout_p: float
    scale: float
    deterministic: bool

    def options(self, q: Tensor, bounds: Tensor) -> dict:
        """Compile-time arguments that all kernels have."""
        W0, W1 = WIDTHS[q.shape[-1]]
        return {
            "CAUSAL": self.causal,
            "DOCUMENTS": bounds.shape[1] > 0,
            "DROPOUT": self.dropout_p > 0,
            "W0": W0,
            "W1": W1,
            "PRECISION": "tf32x3" if capability(q.device) >= (8, 0) else "ieee",
        }

    def tile(self, kernel: str, q: Tensor, k: Tensor) -> attention_tiles.Tile:
        return attention_tiles.choose(
            kernel,
            K=q.shape[-1],
            T=k.shape[2],
            dtype=q.dtype,
            dropout=self.dropout_p > 0,
            capability=capability(q.device),
        )


@triton.jit
def _load_keys(
    ptr, n, stride, Tkv, head, H, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr, KEYS: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    """:func:`load` of keys or values n ... n + KEYS, from a pointer to the head or a descriptor of all heads."""
    if DESCRIPTORS:
        return (ptr.load([head // H, head % H, n, 0]).reshape(KEYS, W0),)
    else:  # noqa: RET505  (Triton would compile it for descriptors too)
        return load(ptr, n, stride, Tkv, MASKED, KEYS, W0, W1)


@triton.jit
def _step(
    acc, total, highest, q, n, k_ptr, k_stride, v_ptr, v_stride, Tkv, low, high, row_keys, column_keys_ptr,
    threshold, scale, head, H, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr, KEYS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax after keys n ... n + KEYS."""
    j = n + tl.arange(0, KEYS)
    k = _load_keys(k_ptr, n, k_stride, Tkv, head, H, MASKED, DESCRIPTORS, KEYS, W0, W1)
    scores = dot_nt(q, k, W1, PRECISION)  # [QUERIES, KEYS]
    if MASKED:
        seen = j[None, :] < high[:, None]
        if DOCUMENTS:
            seen = seen & (j[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    probs = tl.exp2(scores * scale - new[:, None])
    faded = tl.exp2(highest - new)
    total = total * faded + tl.sum(probs, 1)
    if DROPOUT:
        column_keys = tl.load(column_keys_ptr + j, mask=j < Tkv, other=0) if MASKED else tl.load(column_keys_ptr + j)
        probs *= tl.where(keep(row_keys[:, None], column_keys[None, :], threshold), 1.0, 0.0)
    v = _load_keys(v_ptr, n, v_stride, Tkv, head, H, MASKED, DESCRIPTORS, KEYS, W0, W1)
    acc = dot_nn(probs, v, scaled(acc, faded[:, None], W1), W1, PRECISION)
    return acc, total, new


@triton.jit(do_not_specialize=["n_heads", "H", "group", "threshold"])
def _attention_forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides, lse_ptr,
    row_keys_ptr, column_keys_ptr, bounds_ptr, n_heads, H, group, Tq, Tkv, scale, threshold, multiplier,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, k, v (B, H, T, K) with strides of B, H, T; out likewise; lse (B * H, Tq) float32, base 2.

    With DESCRIPTORS k_ptr and v_ptr are tensor descriptors, of blocks (1, 1, KEYS, K).
    """
    n_tiles = tl.cdiv(Tq, QUERIES)
    tile, head = place(n_tiles, n_heads, group)
    m = (n_tiles - 1 - tile) * QUERIES  # the last queries see most: heavy tiles first
    i = m + tl.arange(0, QUERIES)  # [QUERIES]
    q = load(of_head(q_ptr, q_strides, head, H), m, q_strides[2], Tq, True, QUERIES, W0, W1)
    if not DESCRIPTORS:
        k_ptr = of_head(k_ptr, k_strides, head, H)
        v_ptr = of_head(v_ptr, v_strides, head, H)
    row = head.to(tl.int64) * Tq
    row_keys = 0
    if DROPOUT:
        row_keys = tl.load(row_keys_ptr + row + i, mask=i < Tq, other=0)
        column_keys_ptr += head.to(tl.int64) * Tkv

    low, high = seen_keys(i, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS)
    begin, full, full_end, end = tiles_of_keys(m, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS, QUERIES, KEYS)
    acc = zeros(QUERIES, W0, W1)
    total = tl.zeros([QUERIES], tl.float32)
    highest = tl.zeros([QUERIES], tl.float32) + _LOWEST
    for t in range(begin, end - (full_end - full), KEYS):
        n = tl.where(t < full, t, t + full_end - full)
        acc, total, highest = _step(
            acc, total, highest, q, n, k_ptr, k_strides[2], v_ptr, v_strides[2], Tkv, low, high,
            row_keys, column_keys_ptr, threshold, scale, head, H,
            True, DOCUMENTS, DROPOUT, DESCRIPTORS, KEYS, W0, W1, PRECISION,
        )  # fmt: skip
    for n in range(full, full_end, KEYS):
        acc, total, highest = _step(
            acc, total, highest, q, n, k_ptr, k_strides[2], v_ptr, v_strides[2], Tkv, low, high,
            row_keys, column_keys_ptr, threshold, scale, head, H,
            False, DOCUMENTS, DROPOUT, DESCRIPTORS, KEYS, W0, W1, PRECISION,
        )  # fmt: skip

    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    out = scaled(acc, (multiplier / total)[:, None], W1)
    store(of_head(out_ptr, out_strides, head, H), m, out_strides[2], Tq, out, QUERIES, W0, W1)
    # Infinite where nothing was seen: the backward pass then finds probabilities of 0.
    tl.store(lse_ptr + row + i, tl.where(nothing, float("inf"), highest + tl.log2(total)), mask=i < Tq)


def with_strides(*tensors: Tensor) -> list:
    """Each tensor (B, H, T, K), unit stride in K, followed by its strides of B, H and T."""
    return [argument for x in tensors for argument in (x, x.stride()[:3])]


def _describable(x: Tensor) -> bool:
    """Whether a GPU's tensor memory accelerator can load blocks of x (B, H, T, K): heads in one part, 16-byte steps."""
    in_steps = all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])
    return in_steps and x.data_ptr() % 16 == 0 and WIDTHS[x.shape[-1]][1] == 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None, cu_seqlens: Tensor | None, setting: Setting
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out (B, Tq, H, K), lse (B * H, Tq), dropout keys (B * H * (Tq + Tkv),), bounds (2, Tkv)) of q, k, v.

    The last two are empty without dropout and documents.
    """
    B, H, Tq, K = q.shape
    Tkv = k.shape[2]
    out = torch.empty(B, Tq, H, K, dtype=q.dtype, device=q.device)
    lse = torch.empty(B * H, Tq, dtype=torch.float32, device=q.device)
    if setting.dropout_p:
        keys = dropout_key_table(seed, B * H * (Tq + Tkv))
    else:
        keys = torch.empty(0, dtype=torch.int32, device=q.device)
    if cu_seqlens is None:
        bounds = torch.empty(2, 0, dtype=torch.int32, device=q.device)
    else:
        bounds = document_bounds(cu_seqlens, Tkv)
    threshold, multiplier = threshold_and_scale(setting.dropout_p)
    tile = setting.tile("forward", q, k)
    inputs = with_strides(q, k, v, out.transpose(1, 2))
    described = tile.descriptors and _describable(k) and _describable(v)
    if described:
        inputs[2], inputs[4] = (TensorDescriptor(x, x.shape, x.stride(), [1, 1, tile.keys, K]) for x in (k, v))
    launch(
        _attention_forward_kernel, (triton.cdiv(Tq, tile.queries) * B * H,),
        *inputs, lse, keys[: B * H * Tq], keys[B * H * Tq :], bounds,
        B * H, H, heads_in_group(B * H, Tkv, K, q.itemsize), Tq, Tkv, setting.scale * LOG2_E, threshold, multiplier,
        DESCRIPTORS=described, **tile.options(), **setting.options(q, bounds),
    )  # fmt: skip
    return out, lse, keys, bounds
