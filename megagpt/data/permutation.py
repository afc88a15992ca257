"""A pseudo-random permutation of range(n) that is computed and not stored: any entry at once, at any n, in no memory.

An index is written as two digits (left, right) in bases a and b with a*b just above n, and goes through a Feistel
network: six rounds that each add a hash of one digit to the other. Each round can be undone, so the whole is a
bijection of range(a*b); an index that lands outside range(n) goes through again until it is inside ("cycle walking",
here rare, as a*b < n + 2*sqrt(n) + 2). Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
"""

import math

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of each uint64: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream(seed: int, *path: int) -> int:
    """A seed for one purpose, derived from the user's ``seed`` and the numbers that name the purpose."""
    state = np.array([seed & _MASK], np.uint64)
    for number in path:
        state = mix(state + np.uint64((number + 1) * _GOLDEN & _MASK))
    return int(state[0])


def random_uint64(seed: int, index: np.ndarray) -> np.ndarray:
    """64 random bits for each ``index``, a pure function of (seed, index)."""
    state = index.astype(np.uint64) * np.uint64(_GOLDEN)  # wraps: consecutive indices end up far apart
    return mix(mix(state + np.uint64(seed & _MASK)) + np.uint64(_GOLDEN))


def permute(index: np.ndarray, n: int, seed: int | np.ndarray) -> np.ndarray:
    """Where ``index`` goes under permutation ``seed`` of range(n), n up to 2**62.

    ``index`` is an integer array, ``seed`` an int or an array of one uint64 for each index. Returns int64 of the shape
    of ``index``.
    """
    if index.size and not (int(index.min()) >= 0 and int(index.max()) < n):
        raise IndexError(f"an index is outside of range({n})")
    seeds = np.uint64(seed & _MASK) if isinstance(seed, int) else np.asarray(seed, np.uint64)
    a = math.isqrt(max(n - 1, 0)) + 1
    b = -(-n // a)
    out = _network(index.astype(np.uint64), a, b, seeds)
    while (outside := out >= n).any():
        again = seeds if seeds.ndim == 0 else seeds[outside]
        out[outside] = _network(out[outside], a, b, again)
    return out.astype(np.int64)


def _network(x: np.ndarray, a: int, b: int, seeds) -> np.ndarray:
    """One pass of uint64 ``x`` < a*b through the Feistel rounds."""
    bases = (np.uint64(a), np.uint64(b))
    digits = list(np.divmod(x, bases[1]))  # left < a, right < b
    for r in range(_ROUNDS):
        changed = r % 2
        with np.errstate(over="ignore"):  # a scalar seed wraps, as intended
            key = mix(seeds + np.uint64((r + 1) * _GOLDEN & _MASK))
        hashed = mix(digits[1 - changed] + key) >> np.uint64(1)  # 63 bits, so that the sum does not wrap
        digits[changed] = (digits[changed] + hashed) % bases[changed]
    return digits[0] * bases[1] + digits[1]
