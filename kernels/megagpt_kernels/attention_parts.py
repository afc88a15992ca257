"""What the kernels of attention share: the order of their work, tiles of any head width, and who sees whom.

B batch, H heads, K width of one head, Tq and Tkv positions of queries and keys; query i stands at position
i + Tkv - Tq. A query sees an interval of keys, a key is seen by an interval of queries; ``bounds`` (2, Tkv) int32 are
the first position of each position's document and the one after its last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt_kernels.runtime import dot, launch

WIDTHS = {32: (32, 0), 64: (64, 0), 80: (64, 16), 96: (64, 32), 128: (128, 0), 256: (256, 0)}  # parts, powers of two
_L2_SHARE = 16 << 20  # bytes of what heads share that are to stay in the L2 cache; a third of an H100's
_BLOCK = 128
LOG2_E = 1.4426950408889634


@triton.jit
def place(n_tiles, n_heads, group):
    """(tile, head) of this program: all tiles of ``group`` heads one after another, so that what they share stays in
    the L2 cache, and in a group tile 0 of every head first."""
    pid = tl.program_id(0)
    per_group = n_tiles * group
    first = pid // per_group * group
    size = tl.minimum(group, n_heads - first)
    return pid % per_group // size, first + pid % size


@triton.jit
def of_head(ptr, strides, head, H):
    """Where head ``head`` of B * H begins; strides of (B, H, T)."""
    return ptr + (head // H).to(tl.int64) * strides[0] + (head % H).to(tl.int64) * strides[1]


@triton.jit
def _part_offsets(stride, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    return tl.arange(0, ROWS)[:, None] * stride + FIRST + tl.arange(0, WIDTH)[None, :]  # [ROWS, WIDTH]


@triton.jit
def _load_part(ptr, begin, stride, n, RAGGED: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, W: tl.constexpr):
    ptrs = ptr + tl.cast(begin, tl.int64) * stride + _part_offsets(stride, ROWS, FIRST, W)
    if RAGGED:
        return tl.load(ptrs, mask=(begin + tl.arange(0, ROWS) < n)[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def load(ptr, begin, stride, n, RAGGED: tl.constexpr, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Rows ``begin`` ... of a head as a tuple of parts [ROWS, W0] and, unless W1 is 0, [ROWS, W1]; 0 from row n on."""
    parts = (_load_part(ptr, begin, stride, n, RAGGED, ROWS, 0, W0),)
    if W1 > 0:
        parts += (_load_part(ptr, begin, stride, n, RAGGED, ROWS, W0, W1),)
    return parts


@triton.jit
def zeros(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    parts = (tl.zeros([ROWS, W0], tl.float32),)
    if W1 > 0:
        parts += (tl.zeros([ROWS, W1], tl.float32),)
    return parts


@triton.jit
def store(ptr, begin, stride, n, parts, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Store what :func:`load` would load."""
    base = ptr + tl.cast(begin, tl.int64) * stride
    mask = (begin + tl.arange(0, ROWS) < n)[:, None]
    tl.store(base + _part_offsets(stride, ROWS, 0, W0), parts[0].to(ptr.dtype.element_ty), mask=mask)
    if W1 > 0:
        tl.store(base + _part_offsets(stride, ROWS, W0, W1), parts[1].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def add(ptr, begin, stride, n, parts, RAGGED: tl.constexpr, ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Add to what :func:`load` would load, each element at once but in no order."""
    base = ptr + tl.cast(begin, tl.int64) * stride
    mask = (begin + tl.arange(0, ROWS) < n)[:, None] if RAGGED else None
    tl.atomic_add(base + _part_offsets(stride, ROWS, 0, W0), parts[0], mask=mask, sem="relaxed")
    if W1 > 0:
        tl.atomic_add(base + _part_offsets(stride, ROWS, W0, W1), parts[1], mask=mask, sem="relaxed")


@triton.jit
def scaled(parts, factor, W1: tl.constexpr):
    out = (parts[0] * factor,)
    if W1 > 0:
        out += (parts[1] * factor,)
    return out


@triton.jit
def dot_nt(a, b, W1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T in float32 over the parts of both, [rows of a, rows of b]."""
    out = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    out = dot(a[0], tl.trans(b[0]), out, PRECISION)
    if W1 > 0:
        out = dot(a[1], tl.trans(b[1]), out, PRECISION)
    return out


@triton.jit
def dot_nn(a, b, acc, W1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b for the parts of b and of acc."""
    a = a.to(b[0].dtype)
    out = (dot(a, b[0], acc[0], PRECISION),)
    if W1 > 0:
        out += (dot(a, b[1], acc[1], PRECISION),)
    return out


@triton.jit
def seen_keys(i, bounds_ptr, Tq, Tkv, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The interval of keys that query ``i`` sees; both ends never fall as i grows. A row beyond the last is as that."""
    position = tl.minimum(i, Tq - 1) + Tkv - Tq
    low = position * 0
    high = low + Tkv
    if DOCUMENTS:
        low = tl.load(bounds_ptr + position, mask=position >= 0, other=0)
        high = tl.load(bounds_ptr + Tkv + position, mask=position >= 0, other=0)
    if CAUSAL:
        high = tl.maximum(position + 1, 0)
    return low, high


@triton.jit
def seeing_queries(j, bounds_ptr, Tq, Tkv, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr):
    """The interval of queries that see key ``j``; both ends never fall as j grows. None sees a key beyond the last."""
    position = tl.minimum(j, Tkv - 1)
    low = position * 0
    high = low + Tq
    if DOCUMENTS:
        low = tl.maximum(tl.load(bounds_ptr + position) + Tq - Tkv, 0)
        high = tl.maximum(tl.load(bounds_ptr + Tkv + position) + Tq - Tkv, 0)
    if CAUSAL:
        low = tl.maximum(position + Tq - Tkv, 0)
    return tl.where(j < Tkv, low, Tq), high


@triton.jit
def _tiles_between(first_low, first_high, last_low, last_high, BLOCK: tl.constexpr):
    full = tl.cdiv(last_low, BLOCK) * BLOCK
    return first_low // BLOCK * BLOCK, full, tl.maximum(full, first_high // BLOCK * BLOCK), last_high


@triton.jit
def tiles_of_keys(
    m, bounds_ptr, Tq, Tkv, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """What a tile of queries from m on sees, in tiles of keys: (begin, full, full_end, end).

    From ``begin`` to ``end`` there is something to see; from ``full`` to ``full_end`` all see all. full <= full_end.
    """
    first_low, first_high = seen_keys(m, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS)
    last_low, last_high = seen_keys(m + QUERIES - 1, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS)
    return _tiles_between(first_low, first_high, last_low, last_high, KEYS)


@triton.jit
def tiles_of_queries(
    n, bounds_ptr, Tq, Tkv, CAUSAL: tl.constexpr, DOCUMENTS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """Who sees a tile of keys from n on, likewise in tiles of queries."""
    first_low, first_high = seeing_queries(n, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS)
    last_low, last_high = seeing_queries(n + KEYS - 1, bounds_ptr, Tq, Tkv, CAUSAL, DOCUMENTS)
    return _tiles_between(first_low, first_high, last_low, last_high, QUERIES)


@triton.jit
def _bounds_kernel(cu_ptr, bounds_ptr, n, T, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    first = tl.zeros_like(position)
    end = first + T
    for begin in range(0, n, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        cu = tl.load(cu_ptr + i, mask=i < n, other=0).to(tl.int32)[None, :]
        before = cu <= position[:, None]  # [BLOCK, BLOCK]
        first = tl.maximum(first, tl.max(tl.where(before, cu, 0), 1))
        end = tl.minimum(end, tl.min(tl.where(before, T, cu), 1))
    tl.store(bounds_ptr + position, first, mask=position < T)
    tl.store(bounds_ptr + T + position, end, mask=position < T)


def document_bounds(cu_seqlens: Tensor, T: int) -> Tensor:
    """``bounds`` for documents that begin at ``cu_seqlens``, int32 or int64 (n + 1,), ascending, the last one T."""
    bounds = torch.empty(2, T, dtype=torch.int32, device=cu_seqlens.device)
    grid = (triton.cdiv(T, _BLOCK),)
    launch(_bounds_kernel, grid, cu_seqlens.contiguous(), bounds, cu_seqlens.numel(), T, BLOCK=_BLOCK)
    return bounds


def heads_in_group(n_heads: int, T: int, K: int, itemsize: int) -> int:
    """How many heads' two tensors of T rows fit in the share of the L2 cache."""
    return max(1, min(n_heads, _L2_SHARE // (2 * T * K * itemsize)))
