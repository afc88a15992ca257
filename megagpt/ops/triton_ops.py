"""The fused kernels behind the record of operations; the only module that imports ``megagpt_kernels``.

Triton takes a second to import, and decides then whether it compiles or interprets: nothing of it is imported before
a model could be served, and the operations are looked up only when this backend has been chosen.
"""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from megagpt.ops.torch_ops import linear, linear_packer, weighted_cross_entropy

__all__ = ["linear", "linear_packer", "weighted_cross_entropy", "why_not"]


def why_not(*, head_width: int, dtype: torch.dtype, device: torch.device, asked_for: bool = True) -> str | None:
    """The reason why the fused kernels cannot serve such a model, or None.

    In Triton's interpreter (``TRITON_INTERPRET=1``) they run anywhere, slowly, and so only when they are asked for.
    """
    if device.type != "cuda" and not asked_for:
        return f"the model is on {device.type} and kernels need a GPU"
    for package in ("triton", "megagpt_kernels"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    try:
        from megagpt_kernels import runtime
        from megagpt_kernels.attention_parts import WIDTHS
    except ImportError as error:
        return f"the package megagpt_kernels cannot be imported ({error})"
    if head_width not in WIDTHS:
        return f"its heads are {head_width} wide and kernels are made for {', '.join(map(str, WIDTHS))}"
    if runtime.INTERPRETED:
        return runtime.why_not(dtype=dtype, device=device) if asked_for else "TRITON_INTERPRET=1 would make it slow"
    return runtime.why_not(dtype=dtype, device=device) or _no_compiler()


def _no_compiler() -> str | None:
    """Triton has the machine's C compiler make what starts its kernels, at the first launch."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler and there is none: install gcc, or name one in the variable CC"
    headers = Path(sysconfig.get_config_var("INCLUDEPY"))
    if not (headers / "Python.h").exists():
        return f"Triton needs Python's headers and {headers} has none: install python3-dev"
    return None


def __getattr__(name: str):
    """The operation ``name`` of ``megagpt_kernels``."""
    import megagpt_kernels

    if name not in megagpt_kernels.__all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(megagpt_kernels, name)
