"""Tile sizes of the attention kernels, from a table that kernels/tune.py writes."""

import contextlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import torch

from megagpt_kernels.attention_table import TABLE

KERNELS = ("forward", "dkdv", "dkdv_dq", "dq")
COLUMNS = (80, 90, 100)  # compute capabilities, times 10, that have rows


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, and stages of its pipeline of loads.

    With ``descriptors`` the forward kernel has a GPU's tensor memory accelerator load keys and values, where it can.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False

    def options(self) -> dict[str, int]:
        """As compile-time arguments of every kernel."""
        return {"QUERIES": self.queries, "KEYS": self.keys, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        return "{} x {}, {} warps, {} stages".format(*astuple(self)) + ", descriptors" * self.descriptors


_INTERPRETED = Tile(64, 64, 4, 2)
_OLD = Tile(16, 16, 4, 1)  # before 8.0 a block has 64 KB, and wide heads in float32 take 48 of them
_forced: dict[str, Tile] = {}


def column(capability: tuple[int, int]) -> int:
    """The one of COLUMNS that serves a GPU of compute capability 8.0 or higher."""
    return {9: 90, 10: 100, 11: 100}.get(capability[0], 80)  # 12 multiplies as 8 does


def choose(kernel: str, *, K: int, T: int, dtype: torch.dtype, dropout: bool, capability: tuple[int, int]) -> Tile:
    """The tile of ``kernel``, one of KERNELS, for head width K and T keys; in the interpreter always the same."""
    if kernel in _forced:
        return _forced[kernel]
    if capability == (0, 0):
        return _INTERPRETED
    if capability < (8, 0):
        return _OLD
    rows = TABLE[kernel, K, dtype.itemsize, dropout, column(capability)]
    return Tile(*next(tile for longest, tile in rows if longest is None or longest >= T))


@contextlib.contextmanager
def forced(tiles: dict[str, Tile]) -> Iterator[None]:
    """These tiles, by kernel, whatever the table has."""
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
