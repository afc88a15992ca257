"""Comparing an operation with its definition in float64.

No tolerance is guessed: the yardstick is the error that the definition itself, composed of torch's plain operations,
makes in the dtype in question.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(seed: int, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """float64 of N(mean, std^2), the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std + mean


def outputs_and_gradients(fn, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What ``fn(**inputs)`` returns in ``dtype`` and the gradient of every floating input.

    Each output gets a gradient of random numbers that every dtype can hold.
    """
    leaves = {n: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for n, x in inputs.items()}
    outputs = fn(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [(draw(99 + i, *y.shape) * 8).round().div(8).to(y) for i, y in enumerate(outputs)]
    floating = {name: x for name, x in leaves.items() if x.is_floating_point()}
    gradients = torch.autograd.grad(outputs, list(floating.values()), upstream)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"gradient of {name}": g for name, g in zip(floating, gradients, strict=True)}


def assert_as_accurate(
    ours, definition, inputs: dict[str, Tensor], dtype: torch.dtype, *, peer=None, gradient_factor: float = 3
) -> None:
    """``ours`` is at most twice as wrong as ``peer`` (the definition) is in ``dtype``, three times in gradients.

    The factors are those of Dao-AILab/flash-attention, tests/test_flash_attn.py. Inputs are rounded to ``dtype``
    first, so that all see the same numbers. The last digit is always allowed.
    """
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    truth = outputs_and_gradients(definition, inputs, torch.float64)
    theirs = outputs_and_gradients(peer or definition, inputs, dtype)
    found = outputs_and_gradients(ours, inputs, dtype)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        assert found[name].shape == exact.shape, name
        assert found[name].dtype == theirs[name].dtype, name
        error, baseline = (_error(result[name], exact) for result in (found, theirs))
        floor = torch.finfo(found[name].dtype).eps * exact.abs().max().item()
        factor = gradient_factor if name.startswith("gradient") else 2
        assert error <= factor * baseline + floor, f"{name}: error {error:.2e}, the yardstick's {baseline:.2e}"


def assert_equal_to_rounding(ours, definition, inputs: dict[str, Tensor]) -> None:
    """In float64 outputs and gradients agree to 1e-10 of the largest value."""
    truth = outputs_and_gradients(definition, inputs, torch.float64)
    found = outputs_and_gradients(ours, inputs, torch.float64)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        assert found[name].shape == exact.shape, name
        assert _error(found[name], exact) <= 1e-10 * max(1.0, exact.abs().max().item()), name


def _error(found: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where a value is not finite."""
    return (found.double() - exact).abs().nan_to_num(nan=torch.inf).max().item() if exact.numel() else 0.0


class LargestTensor(TorchDispatchMode):
    """While active: ``elements`` is the number of elements of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result
