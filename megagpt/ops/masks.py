"""Dropout masks that are a function of (seed, position) and of nothing else.

Both classes give, for M matrices of R x C elements, any tile of their multipliers: 0 where an element is dropped and
1 / (1 - p) where it stays. A tile is made again from the seed whenever it is needed, in a backward pass or a recomputed
forward pass, so that no mask is kept and no generator's state travels.

:class:`HashedMasks` is the definition, the same on every device and for every way of cutting tiles.
:class:`PooledMasks` costs a CPU nothing but reading memory; its tiles have to be cut the same way each time.
"""

import functools

import torch
from torch import Tensor

_WORD = 1 << 64
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def random_words(seed: Tensor, n: int) -> Tensor:
    """n words of 64 random bits, int64 (n,): SplitMix64 (Steele, Lea, Flood 2014) started at ``seed`` (0-d int64)."""
    x = torch.arange(1, n + 1, device=seed.device).mul_(_signed(_GOLDEN)).add_(seed)
    # A right shift of a signed number copies its sign; the mask makes it a shift of the bits.
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(_MIX_1))
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def random_word(seed: int, index: int) -> int:
    """Word ``index`` of :func:`random_words`, from 0, as an unsigned Python number."""
    x = (seed + (index + 1) * _GOLDEN) % _WORD
    x = (x ^ x >> 30) * _MIX_1 % _WORD
    x = (x ^ x >> 27) * _MIX_2 % _WORD
    return x ^ x >> 31


def _signed(word: int) -> int:
    return word - _WORD if word >> 63 else word


class HashedMasks:
    """An element stays or not by a hash of a random key of its row and one of its column.

        h = (row_key ^ column_key) * MULTIPLIER  mod 2^32,    kept where h, as a signed number, is at least a threshold

    Two integer operations an element and two small tables: cheap in a kernel, and the same in either orientation of a
    tile. Elements that share at most a row or a column are independent; the four corners of a rectangle correlate by
    less than 1e-3. Keys of all rows come first, then those of all columns, two to a word; they have 24 random bits
    above 8 zeros, so that float32 holds h exactly and a kernel may compare in it.
    """

    MULTIPLIER = 0xC2B2AF  # odd; of those tried, one with little correlation left between a rectangle's corners
    LEVELS = 1 << 24
    block_elements = None  # a tile may have any size

    def __init__(self, seed: Tensor, p: float, shape: tuple[int, int, int]) -> None:
        M, R, C = shape
        n = M * (R + C)
        table = random_words(seed, (n + 1) // 2).view(torch.int32)[:n].bitwise_and_(-256)
        self.rows, self.columns = table[: M * R].view(M, R, 1), table[M * R :].view(M, 1, C)
        dropped = min(round(p * self.LEVELS), self.LEVELS - 1)
        self.threshold = 256 * dropped - 2**31
        # From the exact rate, so that the expectation is unchanged.
        self.scale = self.LEVELS / (self.LEVELS - dropped)

    def __call__(self, matrices: slice, rows: slice, columns: slice) -> Tensor:
        """float32 (matrices, rows, columns)."""
        hashed = (self.rows[matrices, rows] ^ self.columns[matrices, :, columns]) * self.MULTIPLIER
        return (hashed >= self.threshold).float().mul_(self.scale)


class PooledMasks:
    """A tile is a window into a constant pool of random multipliers, at an offset drawn from (seed, the tile's corner).

    Within a window elements are independent. The same element in two steps, and two elements of different tiles, read
    the pool at independent places. Two windows may overlap, at a distance that nothing else has; they are the same with
    a probability of 2^-22.
    """

    POOL = 1 << 22  # elements; 16 MiB, which stay in a server's last-level cache
    block_elements = 1 << 20  # largest tile

    def __init__(self, seed: Tensor, p: float, shape: tuple[int, int, int]) -> None:
        self.seed = seed.item()
        self.shape = shape
        self.pool = _pool(p, self.POOL, self.POOL + self.block_elements)

    def __call__(self, matrices: slice, rows: slice, columns: slice) -> Tensor:
        """float32 (matrices, rows, columns), a view of the pool: not to be written to."""
        M, R, C = self.shape
        ranges = [range(n)[cut] for n, cut in ((M, matrices), (R, rows), (C, columns))]
        corner = (ranges[0].start * R + ranges[1].start) * C + ranges[2].start
        m, r, c = map(len, ranges)
        return self._window(corner, m * r * c).view(m, r, c)

    def _window(self, corner: int, n: int) -> Tensor:
        if n > self.block_elements:
            starts = range(corner, corner + n, self.block_elements)
            return torch.cat([self._window(i, min(self.block_elements, corner + n - i)) for i in starts])
        begin = random_word(self.seed, corner) % self.POOL
        return self.pool[begin : begin + n]


@functools.lru_cache(maxsize=4)
def _pool(p: float, period: int, n: int) -> Tensor:
    """Multipliers of ``period`` random elements, continued periodically to n; the kept share is p to within 1e-3."""
    generator = torch.Generator().manual_seed(_GOLDEN % (1 << 63))
    kept = (torch.rand(period, generator=generator) >= p).float()
    kept /= kept.double().mean().float()  # the exact rate, so that the expectation is unchanged
    return torch.cat((kept, kept[: n - period]))


def row_blocks(n_rows: int, n_columns: int, elements: int | None) -> list[slice]:
    """Rows in blocks of at most ``elements`` elements (at least a row), or all at once for None."""
    step = n_rows if elements is None else max(1, elements // n_columns)
    return [slice(begin, min(begin + step, n_rows)) for begin in range(0, n_rows, max(1, step))]
