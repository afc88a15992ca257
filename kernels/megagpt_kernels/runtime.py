"""What all kernels share: how they are launched, on which devices they run, and products of tiles."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import triton
import triton.language as tl

# Triton decides when a kernel is defined whether it will be compiled or interpreted. A version too old to say so has to
# get as far as why_not, which refuses it.
INTERPRETED = hasattr(triton, "knobs") and bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (7, 0)  # the first with tensor cores
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_recorder: Callable | None = None
_capability: tuple[int, int] | None = None


def _mend_interpreter() -> None:
    """Let Triton 3.6's interpreter work with numpy 2.4, round as a GPU does, and be several times as fast.

    A number that a kernel computed can bound a loop: it made an int of an array, which numpy 2.4 no longer does.
    float32 becomes the nearest bfloat16; it was cut off. The language is replaced once for a launch, not again in each
    call of a device function, which took milliseconds. And each sum of integers is not made a second time to see
    whether it overflows, as it isn't in a compiled kernel.
    """
    from triton.runtime import interpreter

    np = interpreter.np
    replace_tensor, replace_language = interpreter._patch_lang_tensor, interpreter._patch_lang
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def with_index(tensor, scope) -> None:
        replace_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    convert = interpreter._convert_float

    def to_nearest(data, dtype, new_dtype, rounding):
        if (dtype, new_dtype) != (tl.float32, tl.bfloat16):
            return convert(data, dtype, new_dtype, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32).reshape(data.shape)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(data), 0x7FC0, nearest).astype(np.uint16)

    interpreter._convert_float = to_nearest
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang_tensor = with_index
    interpreter._patch_lang = lambda kernel: replace_language(everywhere)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


if INTERPRETED:
    _mend_interpreter()


def why_not(*, dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why kernels cannot run on tensors of this dtype on this device, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, MINIMUM_TRITON))}"
    if dtype not in DTYPES:
        return f"{dtype} is not one of float16, bfloat16 and float32"
    if INTERPRETED and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return f"the model is on {device.type} and kernels need a GPU (or TRITON_INTERPRET=1, which is slow)"
    if _capability is None and not torch.cuda.is_available():
        return "torch sees no GPU"
    found = capability(device)
    if found < MINIMUM_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]} is below {'.'.join(map(str, MINIMUM_CAPABILITY))}"
    if dtype == torch.bfloat16 and found < (8, 0):
        return f"compute capability {found[0]}.{found[1]} has no bfloat16 arithmetic; use float16"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) for the interpreter."""
    if _capability is not None:
        return _capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes the host several microseconds."""
    return -(-a // b)


def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 132, as an H100, while recording; 2 in the interpreter, where more would only be slower."""
    if _recorder is not None:
        return 132
    return 2 if INTERPRETED else _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Run ``kernel`` over ``grid`` on the device of the tensors among its arguments, or hand it to the recorder."""
    if _recorder is not None:
        _recorder(kernel, args, options)
        return
    tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
    # Triton launches on the current device, which need not be the data's.
    with torch.cuda.device_of(tensor):
        kernel[grid](*args, **options)


@contextlib.contextmanager
def recording(recorder: Callable, compute_capability: tuple[int, int]) -> Iterator[None]:
    """Call ``recorder(kernel, args, options)`` in place of every launch, as on a GPU of ``compute_capability``.

    With tensors on the meta device this tells which kernels an operation would run, without a GPU.
    """
    global _recorder, _capability
    before = _recorder, _capability
    _recorder, _capability = recorder, compute_capability
    try:
        yield
    finally:
        _recorder, _capability = before


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = "ieee"):
    """acc + a b in float32; ``PRECISION`` matters for float32 tiles only."""
    if _INTERPRETED:  # which multiplies bfloat16 as the integers it keeps them in
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
