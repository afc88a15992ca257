"""Which attention is fastest for a model on this device: measured, among those that are right.

Candidates take packed queries, keys and values (B, T, 3, H, K) and give (B, T, H, K), causal. With dropout only this
project's own are candidates: the masks of torch's are no function of the model's seeds.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megagpt.errors import ConfigError
from megagpt.ops import Ops, torch_ops

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_CHECKED = (1, 200, 3, 2)  # B, T, 3, H of what candidates are checked on: no multiple of their tiles
_ROUNDINGS = 16  # of the largest value, that a result may be off
_TIMED_MS = 90.0  # spent on timing a candidate

Attention = Callable[..., Tensor]
Timer = Callable[[Callable[[], object]], float]  # milliseconds that a call takes


@dataclass(frozen=True)
class Choice:
    """The attention taken, the milliseconds (forward and backward) of all that were timed, and why others were not."""

    attention: str
    milliseconds: dict[str, float]
    dropped: dict[str, str]

    def __str__(self) -> str:
        timed = [f"{name} {ms:.2f} ms" for name, ms in sorted(self.milliseconds.items(), key=lambda item: item[1])]
        dropped = [f"not {name}: {reason}" for name, reason in self.dropped.items()]
        return f"attention {self.attention}" + (f" ({'; '.join([*timed, *dropped])})" if timed or dropped else "")


def choose_attention(
    ops: Ops,
    shape: tuple[int, int, int, int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    dropout_p: float,
    kept: Choice | None = None,
    time: Timer | None = None,
) -> Choice:
    """The fastest attention for training with ``ops`` at ``shape`` (B, T, H, K), to be given to with_attention.

    ``kept``, an earlier choice, stands while it is a candidate and right. By default ``time`` measures on the current
    GPU. Raises ConfigError when no attention is right.
    """
    if dropout_p or torch.are_deterministic_algorithms_enabled():
        return Choice(ops.name, {}, {})
    B, T, H, K = shape
    own = ops.packed_attention
    candidates = {ops.name: own, **{name: _sdpa([form], own) for name, form in _SDPA.items()}}
    small = _random((*_CHECKED, K), dtype, device)
    if kept and kept.attention in candidates and why_wrong(candidates[kept.attention], _definition, small) is None:
        return kept
    return fastest(candidates, _definition, small, _random((B, T, 3, H, K), dtype, device), time or gpu_time)


def with_attention(ops: Ops, name: str) -> Ops:
    """``ops`` with the attention that a choice named."""
    if name == ops.name:
        return ops
    # At other shapes than the one that was timed another form may have to step in.
    forms = dict.fromkeys([_SDPA[name], *_SDPA.values(), SDPBackend.MATH])
    return replace(ops, packed_attention=_sdpa(list(forms), ops.packed_attention))


def fastest(
    candidates: dict[str, Attention], definition: Attention, small: Tensor, full: Tensor, time: Timer
) -> Choice:
    """Of the candidates that agree with ``definition`` on ``small`` the one that ``time`` finds fastest on ``full``.

    Of equals the first, and where none that agrees could be timed too. Raises ConfigError when none agrees.
    """
    right, milliseconds, dropped = [], {}, {}
    for name, candidate in candidates.items():
        reason = why_wrong(candidate, definition, small)
        if reason is None:
            right.append(name)
            try:
                milliseconds[name] = time(_step(candidate, full))
            except Exception as error:  # out of memory, no kernel for this shape, a compiler's: each has its own type
                reason = _first_line(error)
        if reason is not None:
            dropped[name] = reason
    if not right:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in dropped.items())
        raise ConfigError(f"no implementation of attention works on this device ({reasons}); use --kernels torch")
    return Choice(min(right, key=lambda name: milliseconds.get(name, math.inf)), milliseconds, dropped)


def why_wrong(candidate: Attention, definition: Attention, qkv: Tensor) -> str | None:
    """How output or gradient of ``candidate`` differ from those of ``definition`` in float64, or None."""
    truth = _output_and_gradient(definition, qkv.double())
    try:
        found = _output_and_gradient(candidate, qkv)
    except Exception as error:
        return _first_line(error)
    for what, value, exact in zip(("output", "gradient"), found, truth, strict=True):
        error = (value.double() - exact).abs().max().item()
        allowed = _ROUNDINGS * torch.finfo(qkv.dtype).eps * exact.abs().max().item()
        if not error <= allowed:  # nor is NaN
            return f"its {what} is wrong by {error:.1e}, allowed {allowed:.1e}"
    return None


def gpu_time(work: Callable[[], object]) -> float:
    """Milliseconds a call takes on the current GPU: the median of three groups, or of a long call its only time."""
    work()  # compiles, and plans
    once = _group_time(work, 1)
    calls = min(20, int(_TIMED_MS / 3 / max(once, 1e-3)))
    return statistics.median(_group_time(work, calls) for _ in range(3)) if calls else once


def _group_time(work: Callable[[], object], calls: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _sdpa(forms: list[SDPBackend], own: Attention) -> Attention:
    """torch's attention in the first of ``forms`` that can serve; ``own`` for what torch's does not do."""

    def packed_attention(qkv: Tensor, *, dropout_p: float = 0.0, cu_seqlens: Tensor | None = None, **options) -> Tensor:
        if dropout_p or cu_seqlens is not None:
            return own(qkv, dropout_p=dropout_p, cu_seqlens=cu_seqlens, **options)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, T, K)
        with sdpa_kernel(forms, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options.get("scale"))
        return out.transpose(1, 2)

    return packed_attention


def _definition(qkv: Tensor) -> Tensor:
    return torch_ops.attention(*qkv.permute(2, 0, 3, 1, 4).unbind()).transpose(1, 2)


def _output_and_gradient(attention: Attention, qkv: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = attention(leaf)
    upstream = _random(out.shape, torch.float32, out.device).to(torch.bfloat16)  # the same number in every dtype
    (gradient,) = torch.autograd.grad(out, leaf, upstream.to(out.dtype))
    return out.detach(), gradient


def _step(attention: Attention, qkv: Tensor) -> Callable[[], object]:
    leaf = qkv.detach().requires_grad_()
    upstream = _random((*qkv.shape[:2], *qkv.shape[3:]), qkv.dtype, qkv.device)
    return lambda: torch.autograd.grad(attention(leaf), leaf, upstream)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)  # the run's own generators go on as if nothing had happened
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:200]
