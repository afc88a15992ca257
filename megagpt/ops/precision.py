"""In which precision matrices are multiplied."""

import functools

import torch
from torch import Tensor

_CPU_INSTRUCTIONS = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype to multiply a matrix like ``x`` in: its own where the device has instructions for it, else float32.

    A CPU that has none emulates 16-bit products at a third of float32's rate.
    """
    if x.device.type != "cpu" or x.dtype not in _CPU_INSTRUCTIONS or _cpu_multiplies(x.dtype):
        return x.dtype
    return torch.float32


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    # An older torch knows fewer of these questions: bool() is False.
    return any(getattr(torch.cpu, name, bool)() for name in _CPU_INSTRUCTIONS[dtype])
