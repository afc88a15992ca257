"""Sums over the rows of a matrix, in two steps: a partial sum in each program of a kernel, and then the sum of these.

No atomics: which program adds what, and in which order, is a function of the shape and of the device alone, so that
two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt_kernels.runtime import ceil_div, launch

_COLUMNS = 32  # few, so that many multiprocessors take part


@triton.jit
def _sum_kernel(partials_ptr, out_0_ptr, out_1_ptr, P, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    S = tl.num_programs(1)
    which = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, P, ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets = (rows * S + which).to(tl.int64)[:, None] * D + columns[None, :]  # [ROWS, COLUMNS]
        total += tl.load(partials_ptr + offsets, mask=(rows < P)[:, None] & inside[None, :], other=0.0)
    total = tl.sum(total, axis=0)  # [COLUMNS]
    if which == 0:
        tl.store(out_0_ptr + columns, total, mask=inside)
    else:
        tl.store(out_1_ptr + columns, total, mask=inside)


def sum_partials(partials: Tensor, *outs: Tensor) -> None:
    """Write the sums over programs of ``partials``, float32 (P, S, D), into S = 1 or 2 tensors (D,)."""
    P, S, D = partials.shape
    assert len(outs) == S
    rows = min(512, 1 << (P - 1).bit_length())  # as a rule all, so that all loads are under way at once
    grid = (ceil_div(D, _COLUMNS), S)
    launch(_sum_kernel, grid, partials, outs[0], outs[-1], P, D, ROWS=rows, COLUMNS=_COLUMNS, num_warps=8)


def new_partials(P: int, S: int, like: Tensor) -> Tensor:
    """Room for the partial sums of P programs, float32 (P, S, D), D as ``like`` (D,) has it."""
    return torch.empty((P, S, like.shape[0]), dtype=torch.float32, device=like.device)
