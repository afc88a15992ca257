"""Optimisers and their parameter groups.

Which parameter decays is decided here, by name, when the groups are built: a sharded optimiser later sees flat 1-D
tensors and could not tell a bias from a matrix. For the same reason every step counter lives in per-parameter state.
"""

import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megagpt.errors import ConfigError, nearest

_DECAY, _NO_DECAY = "decay", "no_decay"


def parameter_groups(
    named: Iterable[tuple[str, Tensor]],
    decays: Callable[[str], bool],
    *,
    lr: float,
    weight_decay: float,
    prefix: str = "",
) -> list[dict]:
    """Two groups: parameters that decay (every matrix, embeddings included) and those that don't (biases, gains)."""
    groups = {
        _DECAY: {"params": [], "weight_decay": weight_decay},
        _NO_DECAY: {"params": [], "weight_decay": 0.0},
    }
    for name, parameter in named:
        groups[_DECAY if decays(name) else _NO_DECAY]["params"].append(parameter)
    return [{**group, "name": prefix + name, "lr": lr} for name, group in groups.items() if group["params"]]


def decays_group(name: str) -> bool:
    """Whether the group ``name`` of :func:`parameter_groups` is one that decays."""
    return name.rpartition("/")[2] == _DECAY


OPTIMIZERS = ("adamw", "openai_adam", "apex")


class OpenAIAdam(torch.optim.Optimizer):
    """Adam as GPT-1's authors released it: decay scaled by the bias correction, epsilon outside it.

    p <- p - lr_t * (m / (sqrt(v) + eps) + weight_decay * p), lr_t = lr * sqrt(1 - b2^t) / (1 - b1^t), t from 1
    (openai/finetune-transformer-lm opt.py). ``lr`` already carries the schedule's multiplier.
    """

    def __init__(self, params, lr=2.5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    # A tensor, not an int: ZeRO's checkpoints slice and clone whatever the state holds.
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                t = state["step"].item()
                m, v = state["exp_avg"], state["exp_avg_sq"]
                grad = p.grad.to(p.dtype)
                m.lerp_(grad, 1.0 - b1)
                v.mul_(b2).addcmul_(grad, grad, value=1.0 - b2)
                lr = group["lr"] * (1.0 - b2**t) ** 0.5 / (1.0 - b1**t)
                update = m / v.sqrt().add_(group["eps"])
                if group["weight_decay"]:
                    update.add_(p, alpha=group["weight_decay"])
                p.add_(update, alpha=-lr)
        return loss


class GuardedStep:
    """Clips by the global norm and skips an update whose norm is not finite, in front of a plain optimiser.

    DeepSpeed does both inside its ZeRO and 16-bit optimisers; unsharded fp32 training has neither the guard (one NaN
    would poison the weights for ever) nor the norm. The engine reads ``overflow`` and ``_global_grad_norm`` by name.
    """

    clip: float = 0.0  # largest global gradient norm; 0 leaves gradients as they are
    overflow: bool = False
    _global_grad_norm: Tensor | None = None

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        norm = torch.nn.utils.get_total_norm(grads)
        self._global_grad_norm = norm
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return None
        if self.clip and norm > self.clip:
            torch.nn.utils.clip_grads_with_norm_(params, self.clip, norm)
        return super().step(closure)


def behind_guard(cls: type) -> type:
    """The optimiser ``cls`` behind :class:`GuardedStep`."""
    return type(f"Guarded{cls.__name__}", (GuardedStep, cls), {})


def apex_fused_adam() -> type | None:
    """NVIDIA apex's FusedAdam if its extension module is really there; the package of that name on PyPI is another."""
    if importlib.util.find_spec("amp_C") is None or importlib.util.find_spec("apex") is None:
        return None
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def build_optimizer(
    name: str,
    groups: list[dict],
    *,
    betas: tuple[float, float],
    eps: float,
    guarded: bool = False,
    clip: float = 0.0,
    compiled: Callable[[], type | str] = lambda: "not asked for",
) -> tuple[torch.optim.Optimizer, str]:
    """The optimiser and one line saying which implementation it is and why.

    ``guarded`` puts :class:`GuardedStep` with ``clip`` in front (unsharded fp32 training). ``compiled`` returns
    DeepSpeed's Adam class for where the states live, or the reason why there is none; it is asked only for ``adamw``.
    Raises ConfigError for an unknown name and for ``apex`` without NVIDIA's extension modules.
    """
    check_available(name)
    if name == "openai_adam":
        cls, more, line = OpenAIAdam, {}, "openai_adam (decay scaled by the bias correction)"
    elif name == "apex":
        cls, more, line = apex_fused_adam(), {"adam_w_mode": True}, "apex FusedAdam"
    else:
        cls, more, line = _adamw("unsharded fp32 does without" if guarded else compiled())
    if guarded:
        cls = behind_guard(cls)
    optimizer = cls(groups, betas=betas, eps=eps, **more)
    if guarded:
        optimizer.clip = clip
    return optimizer, line


def check_available(name: str) -> None:
    """Raise ConfigError for an optimiser that is unknown or not installed."""
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"--optimizer {name} is unknown{nearest(name, OPTIMIZERS)}; choose one of {', '.join(OPTIMIZERS)}"
        )
    if name == "apex" and apex_fused_adam() is None:
        raise ConfigError(
            "--optimizer apex needs NVIDIA apex built with its CUDA extensions (modules apex.optimizers and "
            "amp_C); the package called apex on PyPI is another one. Use --optimizer adamw"
        )


def _adamw(compiled: type | str) -> tuple[type, dict, str]:
    if isinstance(compiled, str):
        return torch.optim.AdamW, {"fused": True}, f"torch AdamW, fused (no DeepSpeed Adam: {compiled})"
    return compiled, {}, f"DeepSpeed {compiled.__name__}"
