"""Attention, backward: probabilities are made again from the scores and the saved log-sum-exp.

With P the probabilities, Z the dropout mask of zeros and ones, c = 1 / (1 - p), and D = rowsum(dO * O) / c:

    dV = c (P Z)^T dO        dS = P (Z dO V^T - D)        dQ = c scale dS K        dK = c scale dS^T Q

Two forms. The default makes one pass for each tile of keys and adds to dQ in float32 with atomics, in an order that
changes from run to run; the deterministic one makes scores twice, in one kernel for dK and dV and in one for dQ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt_kernels.attention_forward import Setting, with_strides
from megagpt_kernels.attention_parts import (
    LOG2_E,
    WIDTHS,
    add,
    dot_nn,
    dot_nt,
    heads_in_group,
    load,
    of_head,
    place,
    scaled,
    seeing_queries,
    seen_keys,
    store,
    tiles_of_keys,
    tiles_of_queries,
    zeros,
)
from megagpt_kernels.masks import keep, threshold_and_scale
from megagpt_kernels.runtime import launch

_ELEMENTS = 8192  # of a block of the two kernels that only pass over memory


@triton.jit(do_not_specialize=["n_heads", "H"])
def _delta_kernel(
    out_ptr, out_strides, dout_ptr, dout_strides, delta_ptr, dq_ptr, n_heads, H, T, multiplier,
    WITH_DQ: tl.constexpr, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
):  # fmt: skip
    """delta (B * H, T) = rowsum(out * dout) / multiplier, and zeros in dq (B * H, T, K), both float32."""
    tile, head = place(tl.cdiv(T, ROWS), n_heads, 1)
    begin = tile * ROWS
    i = begin + tl.arange(0, ROWS)  # [ROWS]
    out = load(of_head(out_ptr, out_strides, head, H), begin, out_strides[2], T, True, ROWS, W0, W1)
    dout = load(of_head(dout_ptr, dout_strides, head, H), begin, dout_strides[2], T, True, ROWS, W0, W1)
    delta = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), 1)
    if W1 > 0:
        delta += tl.sum(out[1].to(tl.float32) * dout[1].to(tl.float32), 1)
    row = head.to(tl.int64) * T
    tl.store(delta_ptr + row + i, delta / multiplier, mask=i < T)
    if WITH_DQ:
        store(dq_ptr + row * (W0 + W1), begin, W0 + W1, T, zeros(ROWS, W0, W1), ROWS, W0, W1)


@triton.jit(do_not_specialize=["n_heads", "H"])
def _convert_kernel(
    sum_ptr, dq_ptr, dq_strides, n_heads, H, T, factor, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr
):
    """dq = factor * sum, sum (B * H, T, K) float32."""
    tile, head = place(tl.cdiv(T, ROWS), n_heads, 1)
    begin = tile * ROWS
    x = load(sum_ptr + head.to(tl.int64) * T * (W0 + W1), begin, W0 + W1, T, True, ROWS, W0, W1)
    store(of_head(dq_ptr, dq_strides, head, H), begin, dq_strides[2], T, scaled(x, factor, W1), ROWS, W0, W1)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, m, q_ptr, q_stride, dout_ptr, dout_stride, lse_ptr, delta_ptr, dq_ptr, Tq, low, high,
    row_keys_ptr, column_keys, threshold, scale, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    WITH_DQ: tl.constexpr, QUERIES: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums after queries m ... m + QUERIES, from tiles [KEYS, QUERIES]: P^T and dS^T are left factors."""
    i = m + tl.arange(0, QUERIES)
    q = load(q_ptr, m, q_stride, Tq, MASKED, QUERIES, W0, W1)
    lse = tl.load(lse_ptr + i, mask=i < Tq, other=float("inf")) if MASKED else tl.load(lse_ptr + i)
    probs = tl.exp2(dot_nt(k, q, W1, PRECISION) * scale - lse[None, :])
    if MASKED:
        seen = i[None, :] >= low[:, None]
        if DOCUMENTS:
            seen = seen & (i[None, :] < high[:, None])
        probs = tl.where(seen, probs, 0.0)
    dout = load(dout_ptr, m, dout_stride, Tq, MASKED, QUERIES, W0, W1)
    dprobs = dot_nt(v, dout, W1, PRECISION)
    kept = probs
    if DROPOUT:
        row_keys = tl.load(row_keys_ptr + i, mask=i < Tq, other=0) if MASKED else tl.load(row_keys_ptr + i)
        stays = tl.where(keep(row_keys[None, :], column_keys[:, None], threshold), 1.0, 0.0)
        kept *= stays
        dprobs *= stays
    dv = dot_nn(kept, dout, dv, W1, PRECISION)
    delta = tl.load(delta_ptr + i, mask=i < Tq, other=0.0) if MASKED else tl.load(delta_ptr + i)
    dscores = (probs * (dprobs - delta[None, :])).to(q[0].dtype)
    dk = dot_nn(dscores, q, dk, W1, PRECISION)
    if WITH_DQ:
        dq = dot_nn(tl.trans(dscores), k, zeros(QUERIES, W0, W1), W1, PRECISION)
        add(dq_ptr, m, W0 + W1, Tq, dq, MASKED, QUERIES, W0, W1)
    return dk, dv


@triton.jit(do_not_specialize=["n_heads", "H", "group", "threshold"])
def _dkdv_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, dout_ptr, dout_strides, dk_ptr, dk_strides,
    dv_ptr, dv_strides, lse_ptr, delta_ptr, dq_ptr, row_keys_ptr, column_keys_ptr, bounds_ptr,
    n_heads, H, group, Tq, Tkv, scale, threshold, dk_factor, dv_factor,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, WITH_DQ: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, and with WITH_DQ sums in dq (B * H, Tq, K) float32; lse and delta (B * H, Tq) float32."""
    tile, head = place(tl.cdiv(Tkv, KEYS), n_heads, group)  # the first keys are seen by most: heavy tiles first
    n = tile * KEYS
    j = n + tl.arange(0, KEYS)  # [KEYS]
    k = load(of_head(k_ptr, k_strides, head, H), n, k_strides[2], Tkv, True, KEYS, W0, W1)
    v = load(of_head(v_ptr, v_strides, head, H), n, v_strides[2], Tkv, True, KEYS, W0, W1)
    q_ptr = of_head(q_ptr, q_strides, head, H)
    dout_ptr = of_head(dout_ptr, dout_strides, head, H)
    row = head.to(tl.int64) * Tq
    lse_ptr += row
    delta_ptr += row
    column_keys = 0
    if WITH_DQ:
        dq_ptr += row * (W0 + W1)
    if DROPOUT:
        row_keys_ptr += row
        column_keys = tl.load(column_keys_ptr + head.to(tl.int64) * Tkv + j, mask=j < Tkv, other=0)

    low, high = seeing_queries(j, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS)
    begin, full, full_end, end = tiles_of_queries(n, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS, QUERIES, KEYS)
    dk, dv = zeros(KEYS, W0, W1), zeros(KEYS, W0, W1)
    for t in range(begin, end - (full_end - full), QUERIES):
        m = tl.where(t < full, t, t + full_end - full)
        dk, dv = _dkdv_step(
            dk, dv, k, v, m, q_ptr, q_strides[2], dout_ptr, dout_strides[2], lse_ptr, delta_ptr, dq_ptr, Tq, low, high,
            row_keys_ptr, column_keys, threshold, scale, True, DOCUMENTS, DROPOUT, WITH_DQ, QUERIES, W0, W1, PRECISION,
        )  # fmt: skip
    for m in range(full, full_end, QUERIES):
        dk, dv = _dkdv_step(
            dk, dv, k, v, m, q_ptr, q_strides[2], dout_ptr, dout_strides[2], lse_ptr, delta_ptr, dq_ptr, Tq, low, high,
            row_keys_ptr, column_keys, threshold, scale, False, DOCUMENTS, DROPOUT, WITH_DQ, QUERIES, W0, W1, PRECISION,
        )  # fmt: skip
    store(of_head(dk_ptr, dk_strides, head, H), n, dk_strides[2], Tkv, scaled(dk, dk_factor, W1), KEYS, W0, W1)
    store(of_head(dv_ptr, dv_strides, head, H), n, dv_strides[2], Tkv, scaled(dv, dv_factor, W1), KEYS, W0, W1)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, n, k_ptr, k_stride, v_ptr, v_stride, Tkv, low, high, row_keys, column_keys_ptr,
    threshold, scale, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr,
    KEYS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq after keys n ... n + KEYS."""
    j = n + tl.arange(0, KEYS)
    k = load(k_ptr, n, k_stride, Tkv, MASKED, KEYS, W0, W1)
    probs = tl.exp2(dot_nt(q, k, W1, PRECISION) * scale - lse[:, None])  # [QUERIES, KEYS]
    if MASKED:
        seen = j[None, :] < high[:, None]
        if DOCUMENTS:
            seen = seen & (j[None, :] >= low[:, None])
        probs = tl.where(seen, probs, 0.0)
    dprobs = dot_nt(dout, load(v_ptr, n, v_stride, Tkv, MASKED, KEYS, W0, W1), W1, PRECISION)
    if DROPOUT:
        column_keys = tl.load(column_keys_ptr + j, mask=j < Tkv, other=0) if MASKED else tl.load(column_keys_ptr + j)
        dprobs *= tl.where(keep(row_keys[:, None], column_keys[None, :], threshold), 1.0, 0.0)
    return dot_nn(probs * (dprobs - delta[:, None]), k, dq, W1, PRECISION)


@triton.jit(do_not_specialize=["n_heads", "H", "group", "threshold"])
def _dq_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, dout_ptr, dout_strides, dq_ptr, dq_strides,
    lse_ptr, delta_ptr, row_keys_ptr, column_keys_ptr, bounds_ptr,
    n_heads, H, group, Tq, Tkv, scale, threshold, factor,
    CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    W0: tl.constexpr, W1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(Tq, QUERIES)
    tile, head = place(n_tiles, n_heads, group)
    m = (n_tiles - 1 - tile) * QUERIES
    i = m + tl.arange(0, QUERIES)  # [QUERIES]
    q = load(of_head(q_ptr, q_strides, head, H), m, q_strides[2], Tq, True, QUERIES, W0, W1)
    dout = load(of_head(dout_ptr, dout_strides, head, H), m, dout_strides[2], Tq, True, QUERIES, W0, W1)
    k_ptr = of_head(k_ptr, k_strides, head, H)
    v_ptr = of_head(v_ptr, v_strides, head, H)
    row = head.to(tl.int64) * Tq
    lse = tl.load(lse_ptr + row + i, mask=i < Tq, other=float("inf"))
    delta = tl.load(delta_ptr + row + i, mask=i < Tq, other=0.0)
    row_keys = 0
    if DROPOUT:
        row_keys = tl.load(row_keys_ptr + row + i, mask=i < Tq, other=0)
        column_keys_ptr += head.to(tl.int64) * Tkv

    low, high = seen_keys(i, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS)
    begin, full, full_end, end = tiles_of_keys(m, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS, QUERIES, KEYS)
    dq = zeros(QUERIES, W0, W1)
    for t in range(begin, end - (full_end - full), KEYS):
        n = tl.where(t < full, t, t + full_end - full)
        dq = _dq_step(
            dq, q, dout, lse, delta, n, k_ptr, k_strides[2], v_ptr, v_strides[2], Tkv, low, high,
            row_keys, column_keys_ptr, threshold, scale, True, DOCUMENTS, DROPOUT, KEYS, W0, W1, PRECISION,
        )  # fmt: skip
    for n in range(full, full_end, KEYS):
        dq = _dq_step(
            dq, q, dout, lse, delta, n, k_ptr, k_strides[2], v_ptr, v_strides[2], Tkv, low, high,
            row_keys, column_keys_ptr, threshold, scale, False, DOCUMENTS, DROPOUT, KEYS, W0, W1, PRECISION,
        )  # fmt: skip
    store(of_head(dq_ptr, dq_strides, head, H), m, dq_strides[2], Tq, scaled(dq, factor, W1), QUERIES, W0, W1)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, keys: Tensor, bounds: Tensor,
    setting: Setting, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write the gradients into dq, dk, dv, of any strides; dout and out (B, Tq, H, K), the rest as in the forward."""
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    B, H, Tq, K = q.shape
    Tkv = k.shape[2]
    W0, W1 = WIDTHS[K]
    options = setting.options(q, bounds)
    threshold, multiplier = threshold_and_scale(setting.dropout_p)
    factor = setting.scale * multiplier
    tables = keys[: B * H * Tq], keys[B * H * Tq :], bounds
    delta = torch.empty_like(lse)
    fused = not setting.deterministic
    dq_sum = torch.empty(B * H, Tq, K, dtype=torch.float32, device=q.device) if fused else None
    pass_over = {"ROWS": _ELEMENTS // W0, "W0": W0, "W1": W1}
    grid = (triton.cdiv(Tq, _ELEMENTS // W0) * B * H,)

    def sizes(T: int) -> tuple:
        return B * H, H, heads_in_group(B * H, T, K, q.itemsize), Tq, Tkv, setting.scale * LOG2_E, threshold

    launch(
        _delta_kernel, grid, *with_strides(out, dout), delta, dq_sum, B * H, H, Tq, multiplier,
        WITH_DQ=fused, **pass_over,
    )  # fmt: skip
    tile = setting.tile("dkdv_dq" if fused else "dkdv", q, k)
    launch(
        _dkdv_kernel, (triton.cdiv(Tkv, tile.keys) * B * H,),
        *with_strides(q, k, v, dout, dk, dv), lse, delta, dq_sum, *tables, *sizes(Tq), factor, multiplier,
        WITH_DQ=fused, **tile.options(), **options,
    )  # fmt: skip
    if fused:
        launch(_convert_kernel, grid, dq_sum, *with_strides(dq), B * H, H, Tq, factor, **pass_over)
        return
    tile = setting.tile("dq", q, k)
    launch(
        _dq_kernel, (triton.cdiv(Tq, tile.queries) * B * H,),
        *with_strides(q, k, v, dout, dq), lse, delta, *tables, *sizes(Tkv), factor,
        **tile.options(), **options,
    )  # fmt: skip
