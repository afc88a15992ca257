"""Dropout whose mask is a function of the seed and is made again in the backward pass, which is the same kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt_kernels import masks
from megagpt_kernels.operation import operation
from megagpt_kernels.runtime import ceil_div, launch, multiprocessors

_TILE = 4096  # elements; 32 for each of 128 threads
_PROGRAMS = 6  # of 4 warps on each multiprocessor


@triton.jit
def _dropout_kernel(
    x_ptr, seed_ptr, y_ptr,  # (N, D), (), (N, D)
    n_rows, threshold, scale, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program goes down a strip of columns, whose keys it makes once."""
    STRIPS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % STRIPS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    program, programs = tl.program_id(0) // STRIPS, tl.num_programs(0) // STRIPS
    seed = tl.load(seed_ptr)
    column_keys = masks.keys(seed, n_rows + columns)
    for first in range(program * ROWS, n_rows, programs * ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        inside = (rows < n_rows) & (columns < D)
        offsets = rows.to(tl.int64) * D + columns
        kept = masks.keep(masks.keys(seed, rows), column_keys, threshold)  # [ROWS, COLUMNS]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + offsets, x * tl.where(kept, scale, 0.0), mask=inside)


def _forward(x: Tensor, seed: Tensor, p: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    D = x.shape[-1]
    n_rows = x.numel() // max(D, 1)
    columns = min(256, triton.next_power_of_2(D))
    rows = _TILE // columns
    strips = ceil_div(D, columns)
    programs = min(ceil_div(n_rows, rows), ceil_div(_PROGRAMS * multiprocessors(x.device), strips))
    launch(
        _dropout_kernel, (strips * programs,), x, seed, y, n_rows, *masks.threshold_and_scale(p),
        D=D, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return y


def _fake(x, seed, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _derivative(ctx, backward, dy):
    return backward(dy, *ctx.saved_tensors, ctx.p), None, None


_dropout = operation(
    "dropout",
    _forward,
    _forward,
    fake=_fake,
    fake_backward=_fake,
    setup_context=_setup_context,
    derivative=_derivative,
)


def dropout(x: Tensor, *, p: float, seed: Tensor | None) -> Tensor:
    """x with each element zero with probability p and the others scaled up, x (..., D); x itself for p = 0.

    ``seed`` is 0-d int64 on x's device. The mask is that of the keys of (N, D), N the product of the other axes.
    """
    return _dropout(x, seed, p) if p else x
