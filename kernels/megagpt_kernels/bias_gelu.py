"""GELU in its tanh form of a projection's output and its bias: one pass forward, one backward with the bias gradient.

N rows, D columns. 0.5 (1 + tanh(v)) = sigmoid(2 v) for v = sqrt(2 / pi) (u + 0.044715 u^3) and u = x + bias.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt_kernels.operation import operation
from megagpt_kernels.partials import new_partials, sum_partials
from megagpt_kernels.runtime import ceil_div, launch, multiprocessors

_LINEAR = tl.constexpr(1.5957691216057308)  # 2 v = LINEAR u + CUBIC u^3: 2 sqrt(2 / pi), and that times 0.044715
_CUBIC = tl.constexpr(0.07135481282460024)
_TRIPLE = tl.constexpr(3 * 0.07135481282460024)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_SATURATED = tl.constexpr(16.0)  # from here on exp(-2 v) is 0 in float32


@triton.jit
def _decay(u):
    """exp(-2 v)"""
    return tl.exp2(u * (_MINUS_LOG2_E * _LINEAR + (_MINUS_LOG2_E * _CUBIC) * (u * u)))


@triton.jit
def _gelu(u):
    return u / (1.0 + _decay(u))  # far on the left exp overflows to infinity, and the quotient is 0


@triton.jit
def _gelu_slope(u):
    # Everything from exp(-|2 v|), which neither overflows nor cancels: 1 - sigmoid would where it is close to 1.
    size = tl.minimum(tl.abs(u), _SATURATED)
    decay = _decay(size)
    larger = 1.0 / (1.0 + decay)  # sigmoid(|2 v|)
    smaller = decay * larger
    gate = tl.where(u >= 0, larger, smaller)
    return gate + u * (larger * smaller * (_LINEAR + _TRIPLE * (size * size)))


@triton.jit
def _gelu_forward_kernel(x_ptr, bias_ptr, y_ptr, n_rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x, y (N, D), bias (D,)."""
    STRIPS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % STRIPS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = (tl.program_id(0) // STRIPS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = (rows < n_rows) & (columns < D)  # [ROWS, COLUMNS]
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)  # [1, COLUMNS]
    x = tl.load(x_ptr + rows * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * D + columns, _gelu(x + bias), mask=inside)


@triton.jit
def _gelu_backward_kernel(
    dy_ptr, x_ptr, bias_ptr,  # (N, D), (N, D), (D,)
    dx_ptr,  # (N, D)
    partials_ptr,  # (programs of a strip, 1, D)
    n_rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program goes down a strip of columns, whose sums it keeps in registers."""
    STRIPS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % STRIPS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    program, programs = tl.program_id(0) // STRIPS, tl.num_programs(0) // STRIPS
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)  # [1, COLUMNS]
    d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(program * ROWS, n_rows, programs * ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        inside = (rows < n_rows) & (columns < D)
        offsets = rows.to(tl.int64) * D + columns
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dx = dy * _gelu_slope(x + bias)
        d_bias += dx
        tl.store(dx_ptr + offsets, dx, mask=inside)
    d_bias = tl.sum(d_bias, axis=0)[None, :]
    tl.store(partials_ptr + program * D + columns, d_bias, mask=columns < D)


@functools.cache
def _tile(D: int, elements: int) -> tuple[int, int]:
    """Rows and columns: strips that D is a multiple of leave no thread idle, wide ones read memory in long runs."""
    columns = next((c for c in (1024, 512) if D % c == 0), min(256, triton.next_power_of_2(D)))
    return elements // columns, columns


def _forward(x: Tensor, bias: Tensor) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    D = bias.shape[0]
    n_rows = x.numel() // D
    rows, columns = _tile(D, 4096)
    grid = (ceil_div(D, columns) * ceil_div(n_rows, rows),)
    launch(_gelu_forward_kernel, grid, x, bias, y, n_rows, D=D, ROWS=rows, COLUMNS=columns, num_warps=4)
    return y


def _backward(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """dx and d_bias."""
    dy, x, bias = dy.contiguous(), x.contiguous(), bias.contiguous()
    dx, d_bias = torch.empty_like(x), torch.empty_like(bias)
    D = bias.shape[0]
    n_rows = x.numel() // D
    rows, columns = _tile(D, 2048)
    strips = ceil_div(D, columns)
    # Of 128 threads with 80 registers each, a multiprocessor holds 6 programs.
    programs = max(1, min(ceil_div(n_rows, rows), 6 * multiprocessors(x.device) // strips))
    partials = new_partials(programs, 1, bias)
    launch(
        _gelu_backward_kernel, (strips * programs,), dy, x, bias, dx, partials, n_rows,
        D=D, ROWS=rows, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    sum_partials(partials, d_bias)
    return dx, d_bias


def _fake(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(dy, x, bias):
    return _fake(x, bias), torch.empty_like(bias, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)  # the gate is cheaper to make again than to keep


def _derivative(ctx, backward, dy):
    return backward(dy, *ctx.saved_tensors)


_bias_gelu = operation(
    "bias_gelu",
    _forward,
    _backward,
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_setup_context,
    derivative=_derivative,
)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of ``x + bias`` in its tanh form; x (..., D), bias (D,), in float16, bfloat16 or float32."""
    return _bias_gelu(x, bias)
