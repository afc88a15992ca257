"""What each operation launches at the shapes of models: its plain functions, to be called on the meta device."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import shapes

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_RATE = 0.1


class Case(NamedTuple):
    """What kernels are for, the type of their inputs, and the work that launches them."""

    label: str
    dtype: str
    work: Callable[[], object]


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _seed() -> Tensor:
    return _meta(dtype=torch.int64)


def _in_dtypes(all_shapes: tuple, quick: bool) -> Iterator[tuple[object, torch.dtype]]:
    """Every shape in bf16, the first one in all types, whose kernels differ in conversions alone.

    ``quick`` leaves the first and the last shape in bf16.
    """
    for shape in (all_shapes[0], all_shapes[-1]) if quick else all_shapes:
        yield shape, torch.bfloat16
    if not quick:
        yield all_shapes[0], torch.float16
        yield all_shapes[0], torch.float32


def _few(variants: dict[str, tuple], first: bool) -> list[str]:
    """Of the first shape the variant with dropout, which takes most; of the last one those that have none."""
    return list(variants)[1:2] if first else list(variants)[0:3:2]


def _case(shape, dtype: torch.dtype, variant: str, work: Callable, *args) -> Case:
    label = ", ".join(part for part in (shape.name, _NAMES[dtype], variant) if part)
    return Case(label, _NAMES[dtype], functools.partial(work, shape, dtype, *args))


def attention(quick: bool) -> Iterator[Case]:
    from megagpt_kernels.attention_backward import backward
    from megagpt_kernels.attention_forward import Setting, forward

    def work(shape: shapes.Attention, dtype: torch.dtype, p: float, deterministic: bool, documents: bool) -> None:
        B, H, T, K = shape.B, shape.H, shape.T, shape.K
        qkv, dqkv = (_meta(B, T, 3, H, K, dtype=dtype).permute(2, 0, 3, 1, 4).unbind() for _ in range(2))
        setting = Setting(causal=True, dropout_p=p, scale=K**-0.5, deterministic=deterministic)
        cu_seqlens = _meta(5, dtype=torch.int32) if documents else None
        saved = forward(*qkv, _seed() if p else None, cu_seqlens, setting)
        backward(_meta(B, T, H, K, dtype=dtype), *qkv, *saved, setting, *dqkv)

    variants = {
        "": (0.0, False),
        "dropout": (_RATE, False),
        "deterministic": (0.0, True),
        "dropout, deterministic": (_RATE, True),
    }
    for shape, dtype in _in_dtypes(shapes.MODEL_ATTENTION, quick):
        for name in _few(variants, shape is shapes.MODEL_ATTENTION[0]) if quick else variants:
            yield _case(shape, dtype, name, work, *variants[name], False)
    if not quick:
        for shape in (shapes.MODEL_ATTENTION[0], shapes.MODEL_ATTENTION[2]):
            yield _case(shape, torch.bfloat16, "documents", work, 0.0, False, True)
            yield _case(shape, torch.bfloat16, "documents, dropout", work, _RATE, False, True)
        for shape in (*shapes.WIDTH_ATTENTION, *shapes.SWEEP_ATTENTION):
            yield _case(shape, torch.bfloat16, "", work, 0.0, False, False)
            yield _case(shape, torch.bfloat16, "dropout", work, _RATE, False, False)


def bias_gelu(quick: bool) -> Iterator[Case]:
    from megagpt_kernels.bias_gelu import _backward, _forward

    def work(shape: shapes.Rows, dtype: torch.dtype) -> None:
        x, dy, bias = (_meta(*size, dtype=dtype) for size in ((shape.N, shape.D), (shape.N, shape.D), (shape.D,)))
        _forward(x, bias)
        _backward(dy, x, bias)

    for shape, dtype in _in_dtypes(shapes.GELU_ROWS, quick):
        yield _case(shape, dtype, "", work)


def add_layer_norm(quick: bool) -> Iterator[Case]:
    from megagpt_kernels.add_layer_norm import _backward, _forward

    def work(shape: shapes.Rows, dtype: torch.dtype, p: float, has_residual: bool, prenorm: bool) -> None:
        x, d_normed, d_sum = (_meta(shape.N, shape.D, dtype=dtype) for _ in range(3))
        residual = _meta(shape.N, shape.D, dtype=dtype) if has_residual else None
        weight, bias = (_meta(shape.D, dtype=dtype) for _ in range(2))
        seed = _seed() if p else None
        _, total, mean, rstd = _forward(x, residual, weight, bias, seed, p, 1e-5)
        total = total if has_residual or p else x
        _backward(d_normed, d_sum if prenorm else None, total, weight, mean, rstd, seed, p, has_residual)

    variants = {
        "norm alone": (0.0, False, False),
        "pre-norm and dropout": (_RATE, True, True),
        "pre-norm": (0.0, True, True),
    }
    for shape, dtype in _in_dtypes(shapes.NORM_ROWS, quick):
        for name in _few(variants, shape is shapes.NORM_ROWS[0]) if quick else variants:
            yield _case(shape, dtype, name, work, *variants[name])
    if quick:
        return
    # GPT-1 is the one model that normalises after the sum.
    yield _case(shapes.NORM_ROWS[0], torch.bfloat16, "post-norm and dropout", work, _RATE, True, False)


def dropout(quick: bool) -> Iterator[Case]:
    from megagpt_kernels.dropout import _forward

    def work(shape: shapes.Rows, dtype: torch.dtype) -> None:
        _forward(_meta(shape.N, shape.D, dtype=dtype), _seed(), _RATE)

    for shape, dtype in _in_dtypes(shapes.NORM_ROWS, quick):
        yield _case(shape, dtype, "", work)


def linear_cross_entropy(quick: bool) -> Iterator[Case]:
    from megagpt_kernels.linear_cross_entropy import _backward, _forward

    def work(shape: shapes.Head, dtype: torch.dtype) -> None:
        hidden, weight = _meta(shape.N, shape.D, dtype=dtype), _meta(shape.V, shape.D, dtype=dtype)
        targets = _meta(shape.N, dtype=torch.int64)
        loss, d_hidden, d_weight, n = _forward(hidden, weight, targets, -100, 0.0, True, True)
        _backward(loss, n, d_hidden, dtype)
        _backward(loss, n, d_weight, dtype)

    for shape, dtype in _in_dtypes(shapes.HEADS, quick):
        yield _case(shape, dtype, "", work)


OPERATIONS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "attention": attention,
    "bias_gelu": bias_gelu,
    "add_layer_norm": add_layer_norm,
    "dropout": dropout,
    "linear_cross_entropy": linear_cross_entropy,
}
