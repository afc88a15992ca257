"""Which implementations are there to compare with, and why the others are not."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch._functorch import config as functorch_config

# In the order in which they are shown. "torch" is plain torch, operation by operation.
PROVIDERS = ("megagpt", "torch", "torch.compile", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flex", "liger", "apex")


class Absent(Exception):
    """A provider that cannot be compared with; the message says why."""


def kernels(dtype: torch.dtype, device: torch.device):
    """The package of this project's kernels. Raises Absent."""
    try:
        import megagpt_kernels
        from megagpt_kernels import runtime
    except ImportError as error:
        raise Absent(f"megagpt_kernels cannot be imported: {error}") from None
    reason = runtime.why_not(dtype=dtype, device=device)
    if reason:
        raise Absent(reason)
    return megagpt_kernels


def liger(name: str) -> Callable:
    """A function of liger_kernel.transformers.functional. Raises Absent."""
    if not torch.cuda.is_available():
        raise Absent("Liger's kernels need a GPU")
    return _imported("liger_kernel.transformers.functional", name, "pip install liger-kernel")


def apex(module: str, name: str) -> Callable:
    """A function of NVIDIA apex. Raises Absent."""
    if not torch.cuda.is_available():
        raise Absent("apex's kernels need a GPU")
    return _imported(module, name, "NVIDIA apex is built from its source; the package of that name on PyPI is another")


def _imported(module: str, name: str, hint: str) -> Callable:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise Absent(f"{error}; {hint}") from None


def compiled(function: Callable, device: torch.device) -> Callable:
    """``function`` under torch.compile, for one shape."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        raise Absent("torch.compile needs compute capability 7.0")
    # Backward passes are timed by running one of them many times.
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def collect(makers: dict[str, Callable[[], Callable]], wanted: tuple[str, ...]) -> tuple[dict, dict[str, str]]:
    """The providers that can be made, and for each of the others why not.

    A name may go on after its provider's with a comma: "sdpa-cudnn, p 0.125" is one of sdpa-cudnn.
    """
    found, absent = {}, {}
    for name, make in makers.items():
        if name.partition(",")[0] not in wanted:
            continue
        try:
            found[name] = make()
        except Absent as reason:
            absent[name] = str(reason)
    return found, absent


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def always(call: Callable) -> Callable[[], Callable]:
    """The maker of a provider that is never absent."""
    return functools.partial(lambda it: it, call)
