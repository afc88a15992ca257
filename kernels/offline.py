"""Compile the kernels that an operation launches, without a GPU, and read from the machine code what they need.

    report = compile_launches(lambda: attention._forward(q, k, v, ...), arch=90)  # with tensors on the meta device

Triton's own launcher makes each kernel, from the same arguments as on a GPU: it is only told of a device that is not
there. TRITON_INTERPRET may not be set.
"""

import functools
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget

from megagpt_kernels import runtime

# Shared memory that one block may take, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". Registers have a limit of 255 a thread on all of these.
SHARED_LIMIT = {
    **dict.fromkeys((75,), 64 * 1024),
    **dict.fromkeys((86, 89, 120, 121), 99 * 1024),
    **dict.fromkeys((80, 87), 163 * 1024),
    **dict.fromkeys((90, 100, 103, 110), 227 * 1024),
}

# Matrix instructions as cuobjdump names them: Ampere's mma, Hopper's wgmma, Blackwell's tcgen05.mma.
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
_BLOCK_LOAD = re.compile(r"\bUTMALDG\b")
_LOAD_128 = re.compile(r"\b(?:LDG|LDGSTS)\.\S*128")


@dataclass(frozen=True)
class Kernel:
    """What one compiled kernel takes of a multiprocessor; sizes in bytes."""

    name: str
    arch: int  # 90 for compute capability 9.0
    constants: dict  # tile sizes and switches
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    spilled: int  # of a thread's registers, to memory
    shared: int  # of a block
    products: bool  # whether tiles are multiplied
    tensor_core: dict[str, int]  # matrix instructions, by name
    wide_loads: int  # instructions that load 16 bytes a thread
    block_loads: int  # instructions by which the tensor memory accelerator loads a block
    instructions: int
    seconds: float  # to compile; next to nothing when Triton's cache has it
    key: str  # equal for equal machine code


class _Device:
    """As much of a driver as Triton asks for before it compiles: which device is there, and what it is."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # Triton keeps the kernels of each device apart

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(work: Callable[[], object], arch: int, *, only: str = "") -> list[Kernel]:
    """The kernels that ``work`` launches, each once, in order, compiled for compute capability ``arch`` / 10.

    ``work`` runs an operation on tensors on the meta device; ``only`` is the name of the one kernel that counts.
    Raises what Triton raises for a kernel that it cannot compile.
    """
    if runtime.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted and cannot be compiled; unset it")
    found: dict[str, Kernel] = {}

    def compile_one(kernel, args, options) -> None:
        if only and kernel.__name__ != only:
            return
        begun = time.perf_counter()
        compiled = kernel.warmup(*args, grid=(1,), **options)
        if compiled.hash not in found:
            constants = _constants(kernel, args, options)
            found[compiled.hash] = _describe(compiled, arch, constants, time.perf_counter() - begun)

    triton.runtime.driver.set_active(_Device(arch))
    try:
        with runtime.recording(compile_one, divmod(arch, 10)):
            work()
    finally:
        triton.runtime.driver.set_active(None)  # the one that is there, if any, when it is next asked for
    return list(found.values())


def _constants(kernel, args: tuple, options: dict) -> dict:
    """The values of the kernel's constexpr parameters."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    names = [param.name for param in kernel.params if param.is_constexpr]
    return {name: given[name] for name in names if name in given}


def _describe(compiled, arch: int, constants: dict, seconds: float) -> Kernel:
    usage, code = _disassemble(compiled.asm["cubin"])
    counts: dict[str, int] = {}
    for name in _TENSOR_CORE.findall(code):
        counts[name] = counts.get(name, 0) + 1
    return Kernel(
        name=compiled.metadata.name,
        arch=arch,
        constants=constants,
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=int(usage["REG"]),
        spilled=int(usage["STACK"]),
        shared=compiled.metadata.shared,
        products="tt.dot" in compiled.asm["ttir"],
        tensor_core=counts,
        wide_loads=len(_LOAD_128.findall(code)),
        block_loads=len(_BLOCK_LOAD.findall(code)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.MULTILINE)),
        seconds=seconds,
        key=compiled.hash,
    )


@functools.cache
def _disassemble(cubin: bytes) -> tuple[dict[str, str], str]:
    """Resource usage and instructions of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("--dump-resource-usage", file.name)
        return dict(re.findall(r"(\w+):(\d+)", text.rpartition("Function")[2])), _cuobjdump("--dump-sass", file.name)


def _cuobjdump(*args: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
