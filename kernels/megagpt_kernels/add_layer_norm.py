"""Dropout of a branch, its sum with the residual stream, and LayerNorm of the sum: one pass forward, one backward.

N rows, D width. With x_hat = (sum - mean) rstd and w = d_normed * weight,

    d_sum += rstd (w - mean(w) - x_hat mean(w x_hat)),    d_weight = sum(d_normed x_hat),    d_bias = sum(d_normed)

(Ba, Kiros, Hinton 2016). Every activation is read and written once. The sum is kept for the backward pass, x_hat and
the dropout mask are made again.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt_kernels import masks
from megagpt_kernels.layer_norm_kernels import backward_kernel, forward_kernel
from megagpt_kernels.operation import operation
from megagpt_kernels.partials import new_partials, sum_partials
from megagpt_kernels.runtime import ceil_div, launch, multiprocessors


class _Tiles(NamedTuple):
    """How rows are laid out over threads."""

    chunk: int  # columns: 16 bytes for each thread of a row, the widest load there is
    warps: int  # of a row
    rows: int  # of a program
    keep: bool  # whether a row and what belongs to its columns stay in registers
    resident: int  # programs that a multiprocessor holds at once; one more would have to wait for a place
    registers: int  # that a thread can then take


def _tiles(chunk: int, warps: int, rows: int, keep: bool, needed: int) -> _Tiles:
    """For threads that need so many of a multiprocessor's 65,536 registers, which come by eights and end at 255."""
    threads = 32 * warps * rows
    resident = max(1, 65536 // (threads * needed))
    return _Tiles(chunk, warps, rows, keep, resident, min(255, 65536 // (threads * resident) // 8 * 8))


def _chunk(D: int, itemsize: int, most: int) -> tuple[int, int, int]:
    """Columns of a chunk, warps of a row, and a thread's elements of a row, which are at most ``most`` if it can be."""
    vector, warps = 16 // itemsize, 1
    while ceil_div(D, 32 * vector * warps) * vector > most and warps < 16:
        warps *= 2
    chunk = 32 * vector * warps
    return chunk, warps, ceil_div(D, chunk) * vector


# The registers below are what compiled kernels take with dropout, for sm_80, sm_90 and sm_100; fewer would spill.


@functools.cache
def _forward_tiles(D: int, itemsize: int) -> _Tiles:
    chunk, warps, elements = _chunk(D, itemsize, 32)
    keep = D <= 12288
    return _tiles(chunk, warps, 1, keep, 168 if keep and elements > 24 else 128)


@functools.cache
def _backward_tiles(D: int, itemsize: int) -> _Tiles:
    # A narrow row is a warp's own, so that no warp waits for another.
    chunk, warps, elements = _chunk(D, itemsize, 32 if D <= 1024 else 24)
    keep = D <= 8192
    size = elements + 2 * itemsize  # wide elements take more loads
    return _tiles(chunk, warps, max(1, 4 // warps), keep, 128 if size <= 20 or not keep else 168 if size <= 28 else 255)


def _changes(residual: Tensor | None, p: float) -> bool:
    """Whether the sum is another tensor than x."""
    return residual is not None or bool(p)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, seed: Tensor | None, p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normed, sum, mean, rstd; no elements for the sum where it would be x."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    D = weight.shape[0]
    n_rows = x.numel() // D
    normed = torch.empty_like(x)
    total = torch.empty_like(x) if _changes(residual, p) else None
    mean, rstd = (torch.empty(n_rows, dtype=torch.float32, device=x.device) for _ in range(2))
    tiles = _forward_tiles(D, x.itemsize)
    programs = min(n_rows, tiles.resident * multiprocessors(x.device))
    launch(
        forward_kernel, (programs,), x, None if residual is None else residual.contiguous(), weight, bias,
        seed if p else None, normed, total, mean, rstd, n_rows, eps, *masks.threshold_and_scale(p),
        D=D, CHUNK=tiles.chunk, KEEP=tiles.keep, num_warps=tiles.warps, maxnreg=tiles.registers,
    )  # fmt: skip
    return normed, x.new_empty(0) if total is None else total, mean, rstd


def _backward(
    d_normed: Tensor,
    d_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    has_residual: bool,
) -> list[Tensor]:
    """d_weight, d_bias, dx and, where it is another tensor, d_residual."""
    d_normed, total, weight = d_normed.contiguous(), total.contiguous(), weight.contiguous()
    D = weight.shape[0]
    n_rows = total.numel() // D
    dx = torch.empty_like(total)
    d_residual = torch.empty_like(total) if p and has_residual else None
    d_weight, d_bias = torch.empty_like(weight), torch.empty_like(weight)
    tiles = _backward_tiles(D, total.itemsize)
    column_keys = masks.dropout_keys(seed, n_rows, D)[1] if p and not tiles.keep else None
    programs = max(1, min(ceil_div(n_rows, tiles.rows), tiles.resident * multiprocessors(total.device)))
    partials = new_partials(programs, 2, weight)
    launch(
        backward_kernel, (programs,), d_normed, None if d_sum is None else d_sum.contiguous(), total, weight,
        mean, rstd, seed if p else None, column_keys, dx, d_residual, partials, n_rows, *masks.threshold_and_scale(p),
        D=D, CHUNK=tiles.chunk, ROWS=tiles.rows, KEEP=tiles.keep,
        num_warps=tiles.warps * tiles.rows, maxnreg=tiles.registers,
    )  # fmt: skip
    sum_partials(partials, d_weight, d_bias)
    return [d_weight, d_bias, dx] if d_residual is None else [d_weight, d_bias, dx, d_residual]


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake(x, residual, weight, bias, seed, p, eps):
    mean, rstd = (x.new_empty(x.numel() // weight.shape[0], dtype=torch.float32) for _ in range(2))
    return _empty(x), _empty(x) if _changes(residual, p) else x.new_empty(0), mean, rstd


def _fake_backward(d_normed, d_sum, total, weight, mean, rstd, seed, p, has_residual):
    inputs = [_empty(total), _empty(total)] if p and has_residual else [_empty(total)]
    return [_empty(weight), _empty(weight), *inputs]


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, _, seed, ctx.p, _ = inputs
    _, total, *statistics = output
    ctx.has_residual = residual is not None
    if _changes(residual, ctx.p):
        ctx.mark_non_differentiable(*statistics)
    else:
        ctx.mark_non_differentiable(total, *statistics)
        total = x
    ctx.save_for_backward(total, weight, *statistics, seed)
    ctx.set_materialize_grads(False)  # which would write zeros where no gradient arrives


def _derivative(ctx, backward, d_normed, d_sum, *_):
    total, *saved = ctx.saved_tensors
    if d_normed is None:
        d_normed = torch.zeros_like(total)
    d_weight, d_bias, dx, *d_residual = backward(d_normed, d_sum, total, *saved, ctx.p, ctx.has_residual)
    d_residual = d_residual[0] if d_residual else dx
    return dx, d_residual if ctx.has_residual else None, d_weight, d_bias, None, None, None


_add_layer_norm = operation(
    "add_layer_norm",
    _forward,
    _backward,
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    derivative=_derivative,
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, with the biased variance; x (..., D)."""
    return add_layer_norm(x, None, weight, bias, eps=eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of ``dropout(x) + residual``; with ``prenorm`` the pair (normalised, sum).

    x and residual (or None) are (..., D) of one dtype; weight and bias (D,) of that dtype or both float32. A row has to
    fit into a multiprocessor's registers, which spill beyond a D of 16384. ``seed`` is 0-d int64 on x's device. The
    mask is that of the keys of (N, D), N the product of the other axes.
    """
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, and x {x.dtype} {tuple(x.shape)}")
    normed, total, _, _ = _add_layer_norm(x, residual, weight, bias, seed, dropout_p, eps)
    if not prenorm:
        return normed
    return normed, total if _changes(residual, dropout_p) else x
