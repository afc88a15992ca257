"""What each operation launches at the shapes of models: its plain functions, to be called on the meta device.

Every function here yields (what the kernels are for, the work that launches them).
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import shapes

Case = tuple[str, Callable[[], object]]
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_RATE = 0.1


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _seed() -> Tensor:
    return _meta(dtype=torch.int64)


def _in_dtypes(cases: tuple) -> Iterator[tuple[object, torch.dtype, str]]:
    """Every shape in bf16; the first one also in the other types, whose kernels differ in conversions alone."""
    for i, shape in enumerate(cases):
        for dtype, name in _NAMES.items():
            if i == 0 or dtype == torch.bfloat16:
                yield shape, dtype, f"{shape.name} {name}"


def bias_gelu() -> Iterator[Case]:
    from megagpt_kernels.bias_gelu import _backward, _forward

    def work(shape: shapes.Rows, dtype: torch.dtype) -> None:
        x, dy, bias = (_meta(*size, dtype=dtype) for size in ((shape.N, shape.D), (shape.N, shape.D), (shape.D,)))
        _forward(x, bias)
        _backward(dy, x, bias)

    for shape, dtype, label in _in_dtypes(shapes.GELU_ROWS):
        yield label, functools.partial(work, shape, dtype)


def add_layer_norm() -> Iterator[Case]:
    from megagpt_kernels.add_layer_norm import _backward, _forward

    def work(shape: shapes.Rows, dtype: torch.dtype, p: float, has_residual: bool, prenorm: bool) -> None:
        x, d_normed, d_sum = (_meta(shape.N, shape.D, dtype=dtype) for _ in range(3))
        residual = _meta(shape.N, shape.D, dtype=dtype) if has_residual else None
        weight, bias = (_meta(shape.D, dtype=dtype) for _ in range(2))
        seed = _seed() if p else None
        _, total, mean, rstd = _forward(x, residual, weight, bias, seed, p, 1e-5)
        _backward(d_normed, d_sum if prenorm else None, total, weight, mean, rstd, seed, p, has_residual)

    for shape, dtype, label in _in_dtypes(shapes.NORM_ROWS):
        yield f"{label}, norm alone", functools.partial(work, shape, dtype, 0.0, False, False)
        for p in (0.0, _RATE):
            yield f"{label}, pre-norm, p {p:g}", functools.partial(work, shape, dtype, p, True, True)
    shape = shapes.NORM_ROWS[0]  # of GPT-1, the one model here that normalises after the sum
    yield f"{shape.name} bf16, post-norm, p {_RATE}", functools.partial(work, shape, torch.bfloat16, _RATE, True, False)


def dropout() -> Iterator[Case]:
    from megagpt_kernels.dropout import _forward

    for shape, dtype, label in _in_dtypes(shapes.NORM_ROWS):
        yield label, functools.partial(_forward, _meta(shape.N, shape.D, dtype=dtype), _seed(), _RATE)


def linear_cross_entropy() -> Iterator[Case]:
    from megagpt_kernels.linear_cross_entropy import _backward, _forward

    def work(shape: shapes.Head, dtype: torch.dtype) -> None:
        hidden, weight = _meta(shape.N, shape.D, dtype=dtype), _meta(shape.V, shape.D, dtype=dtype)
        targets = _meta(shape.N, dtype=torch.int64)
        loss, d_hidden, d_weight, n = _forward(hidden, weight, targets, -100, 0.0, True, True)
        _backward(loss, n, d_hidden, dtype)
        _backward(loss, n, d_weight, dtype)

    for shape, dtype, label in _in_dtypes(shapes.HEADS):
        yield label, functools.partial(work, shape, dtype)


OPERATIONS: dict[str, Callable[[], Iterator[Case]]] = {
    "bias_gelu": bias_gelu,
    "add_layer_norm": add_layer_norm,
    "dropout": dropout,
    "linear_cross_entropy": linear_cross_entropy,
}
