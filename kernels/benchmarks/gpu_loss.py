"""The output projection and its cross-entropy in one operation."""

import functools
from collections.abc import Callable, Iterator

import gpu_peers
import torch
import torch.nn.functional as F
from gpu_problem import Problem
from torch import Tensor

import shapes
from megagpt.ops import torch_ops


def problems(device: torch.device, wanted: tuple[str, ...], *, quick: bool) -> Iterator[Callable[[], Problem]]:
    """Makers of problems, the most important first."""
    if device.type != "cuda":
        for shape in shapes.SMALL_HEADS[: 1 if quick else None]:
            yield functools.partial(_problem, shape, torch.float32, device, wanted)
        return
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16):
        for shape in shapes.HEADS[: 1 if quick else None]:
            yield functools.partial(_problem, shape, dtype, device, wanted)


def _problem(shape: shapes.Head, dtype: torch.dtype, device: torch.device, wanted: tuple[str, ...]) -> Problem:
    N, D, V = shape.N, shape.D, shape.V
    generator = torch.Generator(device).manual_seed(0)
    inputs = {
        "hidden": torch.randn(N, D, generator=generator, device=device).to(dtype).requires_grad_(),
        "weight": (torch.randn(V, D, generator=generator, device=device) * D**-0.5).to(dtype).requires_grad_(),
        "targets": torch.randint(V, (N,), generator=generator, device=device),
    }
    makers = {
        "megagpt": lambda: gpu_peers.kernels(dtype, device).linear_cross_entropy,
        "torch": gpu_peers.always(_plain),
        "torch, in chunks": gpu_peers.always(torch_ops.linear_cross_entropy),
        "torch.compile": lambda: gpu_peers.compiled(_plain, device),
        "liger": _liger_fused,
        "liger, after the projection": _liger_loss,
        "apex": _apex_loss,
    }
    providers, absent = gpu_peers.collect(makers, wanted)
    size = dtype.itemsize * (N * D + V * D)
    return Problem(
        "linear_cross_entropy",
        shape.name,
        {"N": N, "D": D, "V": V},
        dtype,
        0.0,
        inputs,
        (torch.ones((), device=device),),
        torch_ops.linear_cross_entropy,
        providers,
        absent,
        flops={"both": 6.0 * N * D * V},
        bytes={"both": 2 * size},
        passes=("both",),  # some compute gradients along with the loss, so that one pass alone compares nothing
    )


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _liger_fused() -> Callable:
    loss = gpu_peers.liger("liger_fused_linear_cross_entropy")
    return lambda hidden, weight, targets: loss(hidden, weight, targets)


def _liger_loss() -> Callable:
    loss = gpu_peers.liger("liger_cross_entropy")
    return lambda hidden, weight, targets: loss(F.linear(hidden, weight), targets)


def _apex_loss() -> Callable:
    loss = gpu_peers.apex("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss").apply
    return lambda hidden, weight, targets: loss(F.linear(hidden, weight), targets, 0.0, -100, True).mean()
