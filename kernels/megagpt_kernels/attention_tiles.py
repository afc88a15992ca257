"""Tile sizes of the attention kernels."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, and stages of its pipeline of loads."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As compile-time arguments of a kernel."""
        return {"QUERIES": self.queries, "KEYS": self.keys, "num_warps": self.warps, "num_stages": self.stages}


def choose(kernel: str, *, K: int, T: int, dtype: torch.dtype, dropout: bool, capability: tuple[int, int]) -> Tile:
    """The tile of ``kernel`` ("forward", "dkdv", "dkdv_dq" or "dq") for head width K and T keys."""
    return Tile(64, 64, 4, 2)
