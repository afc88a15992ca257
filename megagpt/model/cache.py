"""Keys and values of the positions that a decoder has read, in memory that is taken once.

B rows, H heads, K width of one head, S positions of a row that are read, T positions of a forward pass. The rows in use
are the first ones: what is computed for all of them are views, and no row is ever gathered or copied to be read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.model.blocks import Ragged
from megagpt.model.config import GPTConfig
from megagpt.ops import Ops


class KeyValueCache:
    """Room for ``rows`` texts of ``positions`` tokens each: 2 L rows H positions K numbers of ``dtype``.

    That may be another dtype than the model's: attention is computed in it.
    """

    def __init__(
        self, config: GPTConfig, *, rows: int, positions: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        shape = (config.n_layer, 2, rows, config.n_head, positions, config.head_width)
        # Zeros, not whatever memory holds: a masked position has the weight 0, and 0 times NaN is NaN.
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.rows, self.positions = rows, positions

    def move(self, source: int, target: int) -> None:
        """Put the row ``source`` in the place of the row ``target``."""
        self.store[:, :, target].copy_(self.store[:, :, source])


class Prefill:
    """A forward pass that reads new rows from their first position on, ids (B, T) filled up at their ends.

    ``slots`` are the B rows of the cache to fill. What stands behind a row's end is of no text: it is never seen, for
    nothing looks ahead, and is written over by what comes.
    """

    def __init__(self, cache: KeyValueCache, slots: list[int], lengths: list[int], ops: Ops) -> None:
        self.cache, self.slots, self.T, self.ops = cache, slots, max(lengths), ops
        device = cache.store.device
        self.positions = torch.arange(self.T, device=device)
        self.ragged = None
        if len(set(lengths)) > 1:
            ends = torch.tensor(lengths, device=device)
            rows = (self.positions < ends[:, None]).flatten().nonzero()[:, 0]
            self.ragged = Ragged(rows, (len(lengths), self.T))

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention (B, T, H, K) of qkv (B, T, 3, H, K), whose keys and values are kept."""
        for i, slot in enumerate(self.slots):
            self.cache.store[layer, :, slot, :, : self.T].copy_(qkv[i, :, 1:].permute(1, 2, 0, 3))
        return self.ops.packed_attention(qkv)


class Step:
    """A forward pass over one new token of each of the first n rows, row i at position ``at[i]``."""

    def __init__(self, cache: KeyValueCache, at: list[int]) -> None:
        self.cache, self.n, self.seen = cache, len(at), max(at) + 1
        device = cache.store.device
        self.positions = torch.tensor(at, device=device)[:, None]  # (B, 1)
        self.ragged = None
        self.equal = min(at) == max(at)
        if not self.equal:
            self.rows = torch.arange(self.n, device=device)
            self.mask = (torch.arange(self.seen, device=device) <= self.positions)[:, None, None]  # (B, 1, 1, S)

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention (B, 1, H, K) of qkv (B, 1, 3, H, K) over what the row has read, itself included."""
        q, k, v = qkv[:, 0].unbind(1)  # each (B, H, K)
        keys, values = self.cache.store[layer, :, : self.n].unbind()
        if self.equal:
            keys[:, :, self.seen - 1], values[:, :, self.seen - 1] = k, v
        else:
            keys[self.rows, :, self.positions[:, 0]] = k.to(keys.dtype)
            values[self.rows, :, self.positions[:, 0]] = v.to(keys.dtype)
        mask = None if self.equal else self.mask
        q = q[:, :, None].to(keys.dtype)
        y = F.scaled_dot_product_attention(q, keys[:, :, : self.seen], values[:, :, : self.seen], attn_mask=mask)
        return y.transpose(1, 2).to(qkv.dtype)


class Layer:
    """What one block sees of a pass."""

    def __init__(self, reading: "Prefill | Step", index: int) -> None:
        self.reading, self.index = reading, index

    def attend(self, qkv: Tensor) -> Tensor:
        return self.reading.attend(self.index, qkv)
