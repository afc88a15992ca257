"""The fused kernels behind the record of operations; the only module that imports ``megagpt_kernels``."""

import importlib.util

import torch


def why_not(*, head_width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why the fused kernels cannot serve such a model, or None."""
    if importlib.util.find_spec("megagpt_kernels") is None:
        return "the package megagpt_kernels is not installed"
    return "this version of megagpt_kernels has no operations for a model yet"
