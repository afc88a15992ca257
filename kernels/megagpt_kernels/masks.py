"""Dropout masks that are a function of (seed, row, column): a hash of a random key of the row and one of the column.

    h = (row_key ^ column_key) * MULTIPLIER  mod 2^32,    kept where h, as a signed number, is at least a threshold

Two integer operations an element and two small tables, the same in either orientation of a tile and for every tile
size. Elements that share at most a row or a column are independent; the corners of a rectangle correlate by less than
1e-3. ``megagpt.ops.masks.HashedMasks`` is the same in torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt_kernels.runtime import ceil_div, launch

_LEVELS = 1 << 24  # a key has 24 random bits above 8 zeros
_BLOCK = 1024
_MULTIPLIER = tl.constexpr(0xC2B2AF)


@triton.jit
def keep(row_keys, column_keys, threshold):
    """bool, of the shape that the int32 keys broadcast to: which elements stay."""
    return (row_keys ^ column_keys) * _MULTIPLIER >= threshold


@triton.jit
def _shift(x, BITS: tl.constexpr):
    # A right shift of a signed number copies its sign; the mask makes it a shift of the bits.
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _words(seed, i):
    # SplitMix64 (Steele, Lea, Flood 2014) started at the seed: a word of 64 bits is two keys.
    x = tl.cast(i + 1, tl.int64) * -7046029254386353131 + seed
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    x = x ^ _shift(x, 31)
    return x & -1095216660736  # ~0xFF in both halves


@triton.jit
def keys(seed, i):
    """Key ``i`` of all rows and then all columns, int32, for a kernel that needs few of them many times."""
    word = _words(seed, i >> 1)
    return tl.where(i & 1 == 0, word.to(tl.int32), (word >> 32).to(tl.int32))


@triton.jit
def _keys_kernel(seed_ptr, keys_ptr, n_words, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    tl.store(keys_ptr + i, _words(tl.load(seed_ptr), i), mask=i < n_words)


def dropout_key_table(seed: Tensor, n: int) -> Tensor:
    """n keys, int32 (n,), drawn from ``seed`` (0-d int64)."""
    n_words = ceil_div(n, 2)
    words = torch.empty(n_words, dtype=torch.int64, device=seed.device)
    launch(_keys_kernel, (ceil_div(n_words, _BLOCK),), seed, words, n_words, BLOCK=_BLOCK)
    return words.view(torch.int32)[:n]


def dropout_keys(seed: Tensor, n_rows: int, n_columns: int) -> tuple[Tensor, Tensor]:
    """Keys of all rows and of all columns, int32 (n_rows,) and (n_columns,): a table and what follows the rows."""
    keys = dropout_key_table(seed, n_rows + n_columns)
    return keys[:n_rows], keys[n_rows:]


def threshold_and_scale(p: float) -> tuple[int, float]:
    """What :func:`keep` compares with, and the factor of kept elements for which the expectation is unchanged."""
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    return 256 * dropped - 2**31, _LEVELS / (_LEVELS - dropped)
