"""Checks of the software: Python, torch, GPUs, compilers, Triton, DeepSpeed's operations, kernels and apex."""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megagpt.config.presets import model_preset
from megagpt.tools.doctor_finding import Finding, error, warning

_PYTHONS = ((3, 10), (3, 12))  # first and last that the tests run with
_PATIENCE = 20.0  # seconds for another program to answer


def examine(model: str) -> Iterator[Finding]:
    """The checks, in order. ``model`` names the preset whose heads the kernels have to serve."""
    yield python()
    try:
        import torch
    except Exception as problem:  # a missing library of CUDA is an OSError, a broken build anything
        yield error("torch", f"cannot be imported: {problem}", "nothing trains", "install torch: pip install torch")
        return
    yield torch_build(torch)
    yield from gpus(torch)
    yield nvcc(torch)
    yield compiler()
    yield triton()
    yield from kernels(torch, model)
    yield deepspeed()
    yield apex()


def python() -> Finding:
    version = sys.version_info[:2]
    found = f"{sys.version.split()[0]}, {sys.executable}"
    if not _PYTHONS[0] <= version <= _PYTHONS[1]:
        return warning("Python", found, "no test runs with this version", "use Python 3.10, 3.11 or 3.12")
    return Finding("Python", found)


def torch_build(torch) -> Finding:
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__}, built for {built}"
    if torch.version.cuda is None and has_driver():
        return error(
            "torch",
            found,
            "this machine has an NVIDIA driver and torch cannot use its GPUs: runs would train on the CPU",
            "install a build for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu126",
        )
    return Finding("torch", found)


def has_driver() -> bool:
    """Whether the kernel of this machine has NVIDIA's driver."""
    return Path("/proc/driver/nvidia/version").exists()


def driver() -> str | None:
    """The version of NVIDIA's driver, or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"


def gpus(torch) -> Iterator[Finding]:
    """A line for the driver with the GPUs, and one for what their compute capability means."""
    version = driver()
    if not torch.cuda.is_available():
        if version is None or torch.version.cuda is None:
            yield Finding("GPU", "none; runs train on the CPU, in fp32 or bf16 (ds_configs/cpu.json)")
            return
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        way_out = (
            f"unset CUDA_VISIBLE_DEVICES, which is {hidden!r}"
            if hidden is not None
            else f"compare nvidia-smi with CUDA {torch.version.cuda}: a driver older than torch's CUDA hides its GPUs"
        )
        yield error("GPU", f"driver {version}, and torch sees no GPU", "runs would train on the CPU", way_out)
        return
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = sorted({f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices})
    yield Finding("GPU", f"{len(devices)} x {', '.join(names)}, driver {version}")
    lowest = min((d.major, d.minor) for d in devices)
    found = f"{lowest[0]}.{lowest[1]}"
    if lowest < (7, 0):
        yield error("capability", found, "fp16 and the fused kernels need 7.0", "use a V100 or newer, or train in fp32")
    elif lowest < (8, 0):
        yield warning("capability", found, "bf16 needs 8.0 (A100)", "use the fp16 files of ds_configs")
    else:
        yield Finding("capability", f"{found}: bf16 and fp16")


def nvcc(torch) -> Finding:
    """The CUDA compiler, which DeepSpeed's own Adam and ZeRO++ are built with."""
    if torch.version.cuda is None:
        return Finding("nvcc", "not needed: torch is built for CPUs")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    program = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    text = output([program, "--version"])
    found = re.search(r"release (\d+)\.(\d+)", text or "")
    if not found:
        return warning(
            "nvcc",
            f"{program} is not there",
            "DeepSpeed's Adam does not build; torch's fused AdamW is used instead. ZeRO++ is not available",
            "install the CUDA toolkit of torch's version and set CUDA_HOME, or leave it",
        )
    ours, theirs = found.groups(), tuple(torch.version.cuda.split(".")[:2])
    line = f"{'.'.join(ours)} in {program}, torch has {'.'.join(theirs)}"
    if ours[0] != theirs[0]:
        return warning(
            "nvcc",
            line,
            "DeepSpeed refuses to build with another major version; torch's fused AdamW is used instead",
            f"point CUDA_HOME to CUDA {theirs[0]}",
        )
    return Finding("nvcc", line)


def compiler() -> Finding:
    program = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if program and cxx:
        return Finding("compiler", f"{program}, {cxx}")
    return warning(
        "compiler",
        "no C and C++ compiler",
        "Triton cannot start its kernels and DeepSpeed cannot build its Adam for offload to the CPU",
        "install gcc, g++ and python3-dev, or name compilers in CC and CXX",
    )


def triton() -> Finding:
    version = installed("triton")
    if version is None:
        return Finding("Triton", "not installed: the operations of torch are used")
    return Finding("Triton", version)


def kernels(torch, model: str) -> Iterator[Finding]:
    """Which operations ``--kernels auto`` takes, and why not others."""
    from megagpt.model.config import GPTConfig
    from megagpt.ops import load_ops

    config = GPTConfig(**model_preset(model))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    ops = load_ops("auto", head_width=config.head_width, dtype=dtype, device=device)
    found = f"{ops.name} for {model} in {str(dtype).removeprefix('torch.')} on {device.type} ({ops.reason})"
    if device.type == "cuda" and ops.name != "triton":
        yield warning(
            "kernels",
            found,
            "training is slower than this GPU allows",
            "mend the reason, or choose a width whose heads the kernels serve (docs/kernels.md)",
        )
    else:
        yield Finding("kernels", found)


def deepspeed() -> Finding:
    """DeepSpeed, and its operations that a run may want."""
    from megagpt.train.engine import buildable_operations

    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed warns there, and --json is read by programs
            version, refusals = buildable_operations()
    except Exception as problem:  # whatever its import meets
        return error(
            "DeepSpeed",
            f"cannot be imported: {problem}",
            "nothing trains",
            "pip install --force-reinstall --no-cache-dir deepspeed",
        )
    builds = [name for name, reason in refusals.items() if reason is None]
    fails = [f"{name}: {reason}" for name, reason in refusals.items() if reason is not None]
    told = [f"{', '.join(builds)} will build" if builds else "", f"not {'; not '.join(fails)}" if fails else ""]
    return Finding("DeepSpeed", f"{version}; {'; '.join(filter(None, told))}")


def apex() -> Finding:
    """NVIDIA's apex by its extension module; the package of that name on PyPI is another one."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "not installed, and not needed")
    where = next(iter(spec.submodule_search_locations or []), "")
    if not Path(where, "optimizers").is_dir():
        return warning(
            "apex",
            f"{installed('apex') or ''} in {where} is not NVIDIA's".strip(),
            "PyPI's package of that name is an unrelated one; other programs that look for NVIDIA's break on it",
            "pip uninstall apex; --optimizer adamw computes the same update",
        )
    if importlib.util.find_spec("amp_C") is None:
        return warning(
            "apex",
            f"in {where}, without its CUDA extensions",
            "--optimizer apex does not work",
            "build it with its extensions (NVIDIA/apex, README), or use --optimizer adamw",
        )
    return Finding("apex", f"NVIDIA's, in {where}")


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(command: list[str]) -> str | None:
    """What a program prints; None where it is not there, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
