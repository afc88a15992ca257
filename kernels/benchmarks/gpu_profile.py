"""Where the time of a training step goes, by the names of the kernels that ran."""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that matches counts. Names are those of CUDA kernels on a GPU, of torch's operators on a CPU.
_KINDS = {
    "attention": r"attention|attn|flash|fmha|sdpa|_(dkdv|dq|delta|convert|bounds)_kernel",
    "norm": r"norm|^(forward|backward)_kernel",
    "gelu": r"gelu",
    "loss": r"cross_entropy|softmax|nll|loss|^_scale_kernel",
    "products": r"gemm|nvjet|cutlass|cublas|splitk|aten::(add|b|)mm",
    "optimiser": r"adam|multi_tensor|foreach",
    "dropout": r"dropout|keys|random|bernoulli",
}
_STEPS = 2


def kinds(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """ms a step of each kind of work."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as trace:
        for _ in range(_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = dict.fromkeys((*_KINDS, "other"), 0.0)
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    for event in trace.key_averages():
        if event.device_type == where:
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found[_kind(event.key)] += 1e-3 * microseconds / _STEPS
    return {kind: ms for kind, ms in found.items() if ms}


def _kind(name: str) -> str:
    for kind, pattern in _KINDS.items():
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"
