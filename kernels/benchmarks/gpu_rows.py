"""Operations on rows, bound by memory: bias + GELU, and dropout + residual + LayerNorm."""

import functools
from collections.abc import Callable, Iterator

import gpu_peers
import torch
import torch.nn.functional as F
from gpu_peers import Absent
from gpu_problem import Problem
from torch import Tensor

import shapes
from megagpt.ops import torch_ops

EPS = 1e-5


def gelu_problems(device: torch.device, wanted: tuple[str, ...], *, quick: bool) -> Iterator[Callable[[], Problem]]:
    """Makers of problems for bias + GELU."""
    for shape, dtype in _cases(shapes.GELU_ROWS, shapes.SMALL_ROWS, device, quick):
        yield functools.partial(_gelu, shape, dtype, device, wanted)


def norm_problems(device: torch.device, wanted: tuple[str, ...], *, quick: bool) -> Iterator[Callable[[], Problem]]:
    """Makers of problems for LayerNorm alone, with a residual, and with dropout too."""
    for shape, dtype in _cases(shapes.NORM_ROWS, shapes.SMALL_ROWS, device, quick):
        yield functools.partial(_norm, shape, dtype, device, wanted)
        for dropout in (0.1, 0.0):
            yield functools.partial(_add_norm, shape, dtype, dropout, device, wanted)


def _cases(large, small, device, quick) -> Iterator[tuple[shapes.Rows, torch.dtype]]:
    if device.type != "cuda":
        yield from ((shape, torch.float32) for shape in small[: 1 if quick else None])
        return
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16):
        yield from ((shape, dtype) for shape in large[: 1 if quick else None])


class _Random:
    """Normal numbers of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)


def _gelu(shape: shapes.Rows, dtype, device, wanted) -> Problem:
    random = _Random(dtype, device)
    inputs = {"x": random(shape.N, shape.D).requires_grad_(), "bias": random(shape.D).requires_grad_()}
    makers = {
        "megagpt": lambda: gpu_peers.kernels(dtype, device).bias_gelu,
        "torch": gpu_peers.always(torch_ops.bias_gelu),
        "torch.compile": lambda: gpu_peers.compiled(torch_ops.bias_gelu, device),
        "liger": functools.partial(_none, "Liger has GELU in gated form only"),
        "apex": functools.partial(_none, "apex has bias + GELU only inside a whole MLP"),
    }
    tensors = {"forward": 2, "backward": 3, "both": 5}
    return _problem("bias_gelu", shape, dtype, 0.0, inputs, 1, torch_ops.bias_gelu, tensors, makers, wanted, random)


def _norm(shape: shapes.Rows, dtype, device, wanted) -> Problem:
    random = _Random(dtype, device)
    inputs = {name: random(shape.D).requires_grad_() for name in ("weight", "bias")}
    inputs = {"x": random(shape.N, shape.D).requires_grad_(), **inputs}
    makers = {
        "megagpt": lambda: gpu_peers.kernels(dtype, device).layer_norm,
        "torch": gpu_peers.always(torch_ops.layer_norm),
        "torch.compile": lambda: gpu_peers.compiled(torch_ops.layer_norm, device),
        "liger": lambda: _positional(gpu_peers.liger("liger_layer_norm"), EPS),
        "apex": lambda: _positional(_apex_norm(), (shape.D,), EPS),
    }
    tensors = {"forward": 2, "backward": 3, "both": 5}
    return _problem("layer_norm", shape, dtype, 0.0, inputs, 1, torch_ops.layer_norm, tensors, makers, wanted, random)


def _add_norm(shape: shapes.Rows, dtype, dropout, device, wanted) -> Problem:
    random = _Random(dtype, device)
    inputs = {name: random(shape.N, shape.D).requires_grad_() for name in ("x", "residual")}
    inputs |= {name: random(shape.D).requires_grad_() for name in ("weight", "bias")}
    seed = torch.tensor(1234, device=device)
    options = {"dropout_p": dropout, "seed": seed, "eps": EPS, "prenorm": True}
    definition = functools.partial(torch_ops.add_layer_norm, **options)
    plain = functools.partial(_composed, F.layer_norm, dropout)
    makers = {
        "megagpt": lambda: functools.partial(gpu_peers.kernels(dtype, device).add_layer_norm, **options),
        "torch": gpu_peers.always(plain),
        "torch.compile": lambda: gpu_peers.compiled(plain, device),
        "liger": lambda: functools.partial(_composed, _without_shape(gpu_peers.liger("liger_layer_norm")), dropout),
        "apex": lambda: functools.partial(_composed, _apex_order(_apex_norm()), dropout),
    }
    # Reads x and residual, writes both outputs; reads their gradients and the sum, writes one gradient for x and, where
    # dropout tells them apart, one for the residual.
    backward = 5 if dropout else 4
    tensors = {"forward": 4, "backward": backward, "both": 4 + backward}
    problem = _problem("add_layer_norm", shape, dtype, dropout, inputs, 2, definition, tensors, makers, wanted, random)
    if dropout:
        problem.own_masks = frozenset(problem.providers) - {"megagpt"}
        problem.undropped = functools.partial(torch_ops.add_layer_norm, eps=EPS, prenorm=True)
    return problem


def _problem(op, shape, dtype, dropout, inputs, n_outputs, definition, tensors, makers, wanted, random) -> Problem:
    providers, absent = gpu_peers.collect(makers, wanted)
    size = shape.N * shape.D * dtype.itemsize
    return Problem(
        op,
        shape.name,
        {"N": shape.N, "D": shape.D},
        dtype,
        dropout,
        inputs,
        tuple(random(shape.N, shape.D) for _ in range(n_outputs)),
        definition,
        providers,
        absent,
        bytes={name: n * size for name, n in tensors.items()},
    )


def _composed(norm: Callable, dropout: float, x, residual, weight, bias) -> tuple[Tensor, Tensor]:
    """What is written without a fused operation: dropout, sum and norm one after the other."""
    total = (F.dropout(x, dropout) if dropout else x) + residual
    return norm(total, weight.shape, weight, bias, EPS), total


def _none(reason: str) -> Callable:
    raise Absent(reason)


def _apex_norm() -> Callable:
    return gpu_peers.apex("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")


def _positional(norm: Callable, *rest) -> Callable:
    return lambda x, weight, bias: norm(x, weight, bias, *rest)


def _without_shape(norm: Callable) -> Callable:
    return lambda x, shape, weight, bias, eps: norm(x, weight, bias, eps)


def _apex_order(norm: Callable) -> Callable:
    return lambda x, shape, weight, bias, eps: norm(x, weight, bias, shape, eps)
