"""Dropout whose mask is a function of (seed, position)."""

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _MIX1, _MIX2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_words(seed: Tensor, n: int) -> Tensor:
    """n words of 64 random bits, int64 (n,): SplitMix64 (Steele, Lea, Flood 2014) started at ``seed``."""
    x = torch.arange(1, n + 1, device=seed.device).mul_(_GOLDEN).add_(seed)
    x ^= (x >> 30) & ((1 << 34) - 1)
    x *= _MIX1
    x ^= (x >> 27) & ((1 << 37) - 1)
    x *= _MIX2
    x ^= (x >> 31) & ((1 << 33) - 1)
    return x


def drop_count(p: float) -> int:
    """How many of the 65,536 values of a 16-bit lane mean "dropped": the rate is p to within 8e-6."""
    return min(max(round(p * 65536), 1), 65535)


def keep_mask(shape: torch.Size, p: float, seed: Tensor) -> Tensor:
    """bool, True where an element stays."""
    n = shape.numel()
    lanes = random_words(seed, (n + 3) // 4).view(torch.int16)[:n]
    return (lanes >= drop_count(p) - 32768).view(shape)


def keep_scale(p: float) -> float:
    """What kept elements are multiplied by, from the exact rate, so that the expectation is unchanged."""
    return 65536 / (65536 - drop_count(p))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        mask = keep_mask(x.shape, p, seed)
        ctx.scale = keep_scale(p)
        ctx.save_for_backward(mask)
        return x * mask * ctx.scale

    @staticmethod
    def backward(ctx, dy):
        (mask,) = ctx.saved_tensors
        return dy * mask * ctx.scale, None, None


def dropout(x: Tensor, *, p: float, seed: Tensor | None) -> Tensor:
    """x with each element zero with probability p, the others scaled up; x itself for p = 0."""
    return _Dropout.apply(x, p, seed) if p else x
