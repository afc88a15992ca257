"""The models whose training steps are timed: one preset under each backend, from the same weights.

The plain loop is tests/reference_gpt.py, with torch's own attention, dropout and loss.
"""

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gpu_peers
import torch
from gpu_clock import Clock, free
from gpu_measure import name_of
from gpu_peers import Absent
from torch import nn

from megagpt.config.presets import model_preset
from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import Ops, load_ops

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import reference_gpt

_COMPILE_S = 4.0  # of a layer, forward and backward, about


@dataclass(frozen=True)
class Case:
    """A preset, trained on B sequences a step, ``steps`` of them in each round."""

    model: str
    dtype: torch.dtype
    dropout: float
    B: int
    steps: int = 10
    changes: dict = field(default_factory=dict)  # of the preset

    @functools.cached_property
    def config(self) -> GPTConfig:
        rates = dict.fromkeys(("embd_dropout", "attn_dropout", "resid_dropout"), self.dropout)
        return GPTConfig(**(model_preset(self.model) | rates | self.changes))

    def __str__(self) -> str:
        return f"{self.model} {name_of(self.dtype)}, dropout {self.dropout:g}"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The most important first."""
    if device.type != "cuda":
        small = {"n_layer": 1, "d_model": 64, "n_head": 2, "seq_len": 16, "vocab_size": 512, "d_ff": 256}
        if quick:
            return [Case("tiny", torch.float32, 0.0, 2, 2, small)]
        return [Case("tiny", torch.float32, dropout, 16) for dropout in (0.0, 0.1)]
    half, brain = torch.float16, torch.bfloat16
    if quick:
        return [Case("gpt2-small", brain, 0.0, 8, steps=2)]
    return [
        Case("gpt2-small", brain, 0.0, 64),
        Case("1.3b", brain, 0.0, 8, steps=5),
        Case("gpt1", brain, 0.1, 64),
        Case("gpt2-small", half, 0.0, 64),
        Case("gpt2-small", brain, 0.1, 64),
        Case("gpt2-medium", brain, 0.0, 32, steps=5),
    ]


class Backends:
    """Makes the models of one case, and tells which are wrong. ``ids`` and ``targets`` (B, T) are a batch for them.

    ``deadline`` is the moment of time.monotonic() by which what compiles has to have been compiled.
    """

    def __init__(self, case: Case, clock: Clock, deadline: float) -> None:
        self.case, self.clock, self.device, self.deadline = case, clock, clock.device, deadline
        config = case.config
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (case.B, config.seq_len + 1)
        batch = torch.randint(config.vocab_size, shape, generator=generator, device=self.device)
        self.ids, self.targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        with self.device:
            self.state = GPT(config, self.ops("torch")).state_dict()

    def makers(self) -> dict[str, Callable[[], Callable[[], nn.Module]]]:
        """Of each backend, what raises Absent or returns what makes the model."""
        torch_model = functools.partial(self._with_ops, "torch")
        return {
            "megagpt": functools.partial(self._with_ops, "triton"),
            "torch": torch_model,
            "torch.compile": lambda: self._compiled(torch_model(), dropout=False),
            "torch, plain loop": lambda: self.plain,
            "torch.compile, plain loop": lambda: self._compiled(self.plain, dropout=True),
        }

    def ops(self, backend: str) -> Ops:
        """Raises Absent where the backend cannot serve."""
        case = self.case
        try:
            return load_ops(backend, head_width=case.config.head_width, dtype=case.dtype, device=self.device)
        except ConfigError as error:
            raise Absent(str(error)) from None

    def ours(self, ops: Ops, dtype: torch.dtype | None = None) -> nn.Module:
        with self.device:
            model = GPT(self.case.config, ops)
        return self._loaded(model, dtype)

    def plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        config = self.case.config
        names = ("vocab_size", "seq_len", "n_layer", "n_head", "d_model", "norm")
        shape = {name: getattr(config, name) for name in names}
        with self.device:
            model = reference_gpt.ReferenceGPT(reference_gpt.ReferenceConfig(**shape, dropout=self.case.dropout))
        return self._loaded(model, dtype)

    def _with_ops(self, backend: str) -> Callable[[], nn.Module]:
        return functools.partial(self.ours, self.ops(backend))

    def _loaded(self, model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        model.load_state_dict(self.state)
        return model.to(dtype or self.case.dtype)

    def _compiled(self, make: Callable[[], nn.Module], *, dropout: bool) -> Callable[[], nn.Module]:
        if not self.clock.on_gpu:
            raise Absent("it compiles for a minute on a CPU; kernels/benchmarks/cpu_train.py compares there")
        if self.case.dropout and not dropout:
            raise Absent("this project's dropout in plain torch is a definition, not made to be compiled")
        seconds = _COMPILE_S * self.case.config.n_layer
        if time.monotonic() + seconds > self.deadline:
            raise Absent("no time was left to compile it; give more --minutes, or none")
        self.deadline -= seconds  # the next one compiles after it
        return lambda: torch.compile(make(), dynamic=False)

    def wrong(self, models: dict[str, Callable[[], nn.Module]]) -> dict[str, str]:
        """Why some are: loss or gradient without dropout further from float64's than twice what plain torch's is."""
        truth = self._loss_and_norm(self.ours(self.ops("torch"), torch.float64))
        plain = self._loss_and_norm(self.plain())
        reasons = {}
        for name, make in models.items():
            # What is compiled is checked uncompiled: compiling it once more takes a minute.
            if not name.startswith("torch.compile") and (reason := self._why_wrong(make, truth, plain)):
                reasons[name] = reason
            free(self.clock)
        return reasons

    def _why_wrong(self, make, truth: tuple[float, float], plain: tuple[float, float]) -> str:
        try:
            found = self._loss_and_norm(make())
        except Exception as error:
            return f"cannot run: {gpu_peers.first_line(error)}"
        rounding = 2 * torch.finfo(self.case.dtype).eps  # sums in another order end a few roundings apart
        for what, exact, yardstick, value in zip(("loss", "gradient's norm"), truth, plain, found, strict=True):
            limit = 2 * abs(yardstick - exact) + rounding * exact
            if not abs(value - exact) <= limit:
                return f"wrong: the {what} is {value:.5g}, in float64 {exact:.5g}, allowed {limit:.1e}"
        return ""

    def _loss_and_norm(self, model: nn.Module) -> tuple[float, float]:
        loss = model.eval()(self.ids[:2], self.targets[:2])
        loss.backward()
        norms = [p.grad.double().norm() for p in model.parameters()]
        return loss.item(), torch.stack(norms).norm().item()
