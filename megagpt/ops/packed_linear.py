"""Projections of a few rows at once on a CPU, as in decoding several texts: from weights in oneDNN's own layout.

A product of few rows takes as long as reading the weights, and a layout made for it is read up to twice as fast as the
rows of a matrix. The weights are then in memory twice, so this is for a model that no longer changes.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# As measured with AVX-512 on two threads: with fewer rows torch's own product is as fast, with more it is faster unless
# it has to widen the weights each time.
_LEAST_ROWS, _MOST_ROWS = 3, 64
# Of both kinds by their name in /proc/self/cgroup: where they are, and the files with the limit and what is in use.
_CONTROL_GROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
}
_SHARE_OF_MEMORY = 0.5  # of what is free, that weights may take a second time


class PackedLinear:
    """``linear`` for one weight (D_out, D_in), which must not change; called with that weight as ``linear`` is.

    Computes in ``dtype``, without gradients. ``rows`` are those of the products that it is made for.
    """

    def __init__(self, weight: Tensor, *, rows: int, dtype: torch.dtype, linear: Callable) -> None:
        self._linear, self._dtype = linear, dtype
        self._most_rows = _MOST_ROWS if weight.dtype == dtype else None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows < _LEAST_ROWS or rows > (self._most_rows or rows):
            return self._linear(x, weight, bias)
        bias = None if bias is None else bias.to(self._dtype)
        return torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._packed, bias, "none", [], "").to(x.dtype)


def can_pack(n_weights: int, *, rows: int, dtype: torch.dtype) -> bool:
    """Whether products of up to ``rows`` rows gain by ``n_weights`` numbers of ``dtype`` in memory once more."""
    offered = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return offered and rows >= _LEAST_ROWS and n_weights * dtype.itemsize <= _SHARE_OF_MEMORY * free_memory()


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the machine has, or its control groups where that is less."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers not in _CONTROL_GROUPS:
            continue
        mount, *names = _CONTROL_GROUPS[controllers]
        for folder in (Path(group), *Path(group).parents):
            try:
                limit, used = (int((root / f"{mount}{folder}" / name).read_text()) for name in names)
            except (OSError, ValueError):  # no limit of its own
                continue
            free = min(free, limit - used)
    return free
