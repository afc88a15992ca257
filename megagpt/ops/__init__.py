"""The operations that have more than one implementation, as a record of plain functions chosen once.

A backend is a module with functions of these names and ``why_not(head_width, dtype, device, asked_for) -> str | None``;
``asked_for`` is whether the user named this backend.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from megagpt.errors import ConfigError, nearest

# Fastest first: "auto" takes the first that can serve the model.
_BACKENDS = {"triton": "megagpt.ops.triton_ops", "cpu": "megagpt.ops.cpu_ops", "torch": "megagpt.ops.torch_ops"}


@dataclass(frozen=True)
class Ops:
    """What a decoder computes with. Signatures and meaning are those of the functions in ``torch_ops``."""

    attention: Callable
    packed_attention: Callable
    bias_gelu: Callable
    add_layer_norm: Callable
    layer_norm: Callable
    dropout: Callable
    linear: Callable
    linear_packer: Callable
    linear_cross_entropy: Callable
    weighted_cross_entropy: Callable
    name: str = "torch"
    reason: str = ""  # why this backend was taken


_OPERATIONS = [field.name for field in fields(Ops) if field.name not in ("name", "reason")]


def load_ops(name: str, *, head_width: int, dtype: torch.dtype, device: torch.device | str) -> Ops:
    """The backend ``name`` ("triton", "cpu", "torch"), or with "auto" the fastest that serves this model and why.

    Raises ConfigError when the backend is unknown or cannot serve the head width, dtype or device.
    """
    known = ("auto", *_BACKENDS)
    if name not in known:
        raise ConfigError(f"--kernels {name} is unknown{nearest(name, known)}; choose one of {', '.join(known)}")
    model = {"head_width": head_width, "dtype": dtype, "device": torch.device(device)}
    refusals = []
    for backend in _BACKENDS if name == "auto" else (name,):
        module = importlib.import_module(_BACKENDS[backend])
        why_not = module.why_not(**model, asked_for=backend == name)
        if why_not is None:
            reason = "asked for" if name == backend else "; ".join(refusals) or "the fastest"
            return _record(module, backend, reason)
        refusals.append(f"{backend} cannot serve this model: {why_not}")
    raise ConfigError(f"--kernels {name}: {'; '.join(refusals)}. Use --kernels torch or auto")


def _record(module, name: str, reason: str) -> Ops:
    return Ops(**{operation: getattr(module, operation) for operation in _OPERATIONS}, name=name, reason=reason)
