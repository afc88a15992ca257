"""One training step without DeepSpeed: 16-bit weights, 32-bit masters, clipping and AdamW."""

import contextlib
import statistics

import torch
from gpu_clock import Clock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_FP16_SCALE = 1024.0


class Step:
    """Calling it takes one step on ids and targets (B, T); ``sdpa`` is torch's attention to prefer, or None."""

    def __init__(self, model: nn.Module, ids: Tensor, targets: Tensor, sdpa: SDPBackend | None) -> None:
        self.model, self.ids, self.targets, self.sdpa = model.train(), ids, targets, sdpa
        self.params = list(model.parameters())
        self.scale = _FP16_SCALE if self.params[0].dtype == torch.float16 else 1.0
        self.masters = [p.detach().clone().float() for p in self.params]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self.adam = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def __call__(self) -> None:
        with _preferring(self.sdpa):
            loss = self.model(self.ids, self.targets)
            (loss * self.scale).backward()
        grads = [master.grad for master in self.masters]
        torch._foreach_copy_(grads, [p.grad for p in self.params])
        if self.scale != 1.0:
            torch._foreach_mul_(grads, 1 / self.scale)
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.masters)
        self.model.zero_grad(set_to_none=True)


def _preferring(sdpa: SDPBackend | None) -> contextlib.AbstractContextManager:
    if sdpa is None:
        return contextlib.nullcontext()
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel([sdpa, *(other for other in others if other != sdpa)], set_priority=True)


def fastest_sdpa(
    clock: Clock, shape: tuple[int, int, int, int], dtype: torch.dtype, dropout: float
) -> SDPBackend | None:
    """Of torch's attentions on a GPU the one that is fastest forward and backward at ``shape`` (B, T, H, K)."""
    if not clock.on_gpu:
        return None
    q = torch.randn(shape, device=clock.device).to(dtype).transpose(1, 2).requires_grad_()

    def attend() -> None:
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=dropout)
        torch.autograd.grad(out, q, out)

    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):
            times[backend] = statistics.median(clock.samples(attend))
    return min(times, key=times.get) if times else None
