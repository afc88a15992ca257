"""Whole training steps (forward, backward, optimiser) of the presets under each backend, without DeepSpeed.

Weights are 16-bit with 32-bit masters, as DeepSpeed keeps them, and the same AdamW updates them under every backend.
The plain loop is tests/reference_gpt.py, which a reader of papers would write: torch's own attention, dropout and loss.
"""

import dataclasses
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gpu_peers
import gpu_profile
import timing
import torch
from gpu_clock import Clock
from gpu_measure import against_peers, name_of
from gpu_peers import Absent
from gpu_report import Report
from gpu_step import Step, fastest_sdpa
from torch import nn

from megagpt.config.presets import model_preset
from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import Ops, load_ops
from megagpt.train.hardware import peak_flops

sys.path.append(str(Path(__file__).parents[2] / "tests"))
import reference_gpt

ROUNDS, WARM_UP = 3, 5
_BYTES_A_PARAMETER = 22  # weight and gradient in 16 bits, master, its gradient and two moments in 32


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens a step."""

    model: str
    dtype: torch.dtype
    dropout: float
    B: int
    changes: dict = dataclasses.field(default_factory=dict)
    steps: int = 10  # of each round

    @functools.cached_property
    def config(self) -> GPTConfig:
        rates = dict.fromkeys(("embd_dropout", "attn_dropout", "resid_dropout"), self.dropout)
        return GPTConfig(**(model_preset(self.model) | rates | self.changes))

    def __str__(self) -> str:
        return f"{self.model} {name_of(self.dtype)}, dropout {self.dropout:g}"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """The most important first."""
    if device.type != "cuda":
        small = {"n_layer": 2, "d_model": 64, "n_head": 2, "seq_len": 64, "vocab_size": 512, "d_ff": 256}
        return [
            Case("tiny", torch.float32, dropout, 4, small, steps=2) for dropout in ((0.0,) if quick else (0.0, 0.1))
        ]
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


def measure_models(
    clock: Clock, report: Report, wanted: tuple[str, ...], deadline: float, *, quick: bool
) -> list[dict]:
    """A record for each case and backend, which also go to ``report``."""
    for i, case in enumerate(cases(clock.device, quick)):
        if time.monotonic() > deadline:
            report.skipped.append(f"model: {case}")
            continue
        bench = Bench(case, clock, rounds=1 if quick else ROUNDS)
        report.steps += bench.measure(wanted, contributions=i == 0)
        _free(clock)
    return report.steps


class Bench:
    """The backends of one case."""

    def __init__(self, case: Case, clock: Clock, rounds: int) -> None:
        self.case, self.clock, self.device, self.rounds = case, clock, clock.device, rounds
        config = case.config
        generator = torch.Generator(self.device).manual_seed(0)
        tokens = (case.B, config.seq_len + 1)
        batch = torch.randint(config.vocab_size, tokens, generator=generator, device=self.device)
        self.ids, self.targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        with self.device:
            self.state = GPT(config, self._ops("torch")).state_dict()  # the same weights for all, in float32
        heads = (case.B, config.seq_len, config.n_head, config.head_width)
        self.sdpa = fastest_sdpa(clock, heads, case.dtype, case.dropout)

    def measure(self, wanted: tuple[str, ...], *, contributions: bool) -> list[dict]:
        models, absent = gpu_peers.collect(self._makers(), wanted)
        records = [self._record(name, status="absent", reason=reason) for name, reason in absent.items()]
        for name, reason in self._wrong(models).items():
            records.append(self._record(name, status="wrong", reason=reason))
            del models[name]
        together = self._memory(len(models)) < 0.4
        samples: dict[str, list[list[float]]] = {}
        steps, kinds, peaks = {}, {}, {}
        for group in [list(models)] if together else [[name] for name in models]:
            steps = {name: self._step(models[name]()) for name in group}
            for name, step in steps.items():
                peaks[name] = self.clock.peak_mb(lambda step=step: [step() for _ in range(WARM_UP)])
            samples |= timing.interleave(
                {name: functools.partial(self._block, step) for name, step in steps.items()}, self.rounds
            )
            for name, step in steps.items():
                kinds[name] = gpu_profile.kinds(step, self.device)
            del steps
            _free(self.clock)
        rounds = {name: [statistics.median(each) for each in values] for name, values in samples.items()}
        for name, each in samples.items():
            without = {}
            if name == "megagpt" and contributions:
                without = self._contributions(statistics.median(rounds[name]))
            values = sorted(value for block in each for value in block)
            extra = {"kinds": kinds[name], "without": without, "peak_mb": peaks[name], **against_peers(name, rounds)}
            records.append(self._record(name, status="timed", **self._rates(values), **extra))
        return records

    def _step(self, model: nn.Module) -> Step:
        return Step(model, self.ids, self.targets, self.sdpa)

    def _block(self, step: Step) -> list[float]:
        return self.clock.runs(step, self.case.steps)

    def _record(self, backend: str, **values) -> dict:
        case, config = self.case, self.case.config
        record = {
            "model": case.model,
            "dims": f"B{case.B} T{config.seq_len} L{config.n_layer} D{config.d_model} H{config.n_head}",
            "dtype": name_of(case.dtype),
            "dropout": case.dropout,
            "backend": backend,
            **values,
        }
        return {name: record.get(name) for name in STEP_FIELDS}

    def _rates(self, values: list[float]) -> dict:
        """Times in ms, and what follows from them."""
        case, ms = self.case, statistics.median(values)
        tokens_per_s = 1e3 * case.B * case.config.seq_len / ms
        peak = peak_flops(torch.cuda.get_device_name(self.device), name_of(case.dtype)) if self.clock.on_gpu else None
        return {
            "ms": ms,
            "p20": values[int(0.2 * (len(values) - 1))],
            "p80": values[round(0.8 * (len(values) - 1))],
            "tokens_per_s": tokens_per_s,
            "mfu": case.config.flops_per_token() * tokens_per_s / peak if peak else None,
        }

    # -- the backends

    def _makers(self) -> dict[str, Callable[[], Callable[[], nn.Module]]]:
        """Of each backend: what raises Absent, or returns what makes the model."""
        return {
            "megagpt": lambda: functools.partial(self._ours, self._ops("triton")),
            "torch": lambda: functools.partial(self._ours, self._ops("torch")),
            "torch.compile": lambda: self._compiled(functools.partial(self._ours, self._ops("torch"))),
            "torch, plain loop": lambda: self._plain,
            "torch.compile, plain loop": lambda: self._compiled(self._plain),
        }

    def _ops(self, backend: str) -> Ops:
        case = self.case
        try:
            return load_ops(backend, head_width=case.config.head_width, dtype=case.dtype, device=self.device)
        except ConfigError as error:
            raise Absent(str(error)) from None

    def _ours(self, ops: Ops, dtype: torch.dtype | None = None) -> nn.Module:
        with self.device:
            return self._loaded(GPT(self.case.config, ops), dtype)

    def _plain(self, dtype: torch.dtype | None = None) -> nn.Module:
        config = self.case.config
        names = ("vocab_size", "seq_len", "n_layer", "n_head", "d_model", "norm")
        shape = {name: getattr(config, name) for name in names}
        with self.device:
            model = reference_gpt.ReferenceGPT(reference_gpt.ReferenceConfig(**shape, dropout=self.case.dropout))
        return self._loaded(model, dtype)

    def _loaded(self, model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        model.load_state_dict(self.state)
        return model.to(dtype or self.case.dtype)

    def _compiled(self, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if not self.clock.on_gpu:
            raise Absent("it compiles for a minute on a CPU; kernels/benchmarks/cpu_train.py compares there")
        if self.case.dropout and make is not self._plain:
            raise Absent("this project's dropout in plain torch is a definition, not made to be compiled")
        return lambda: torch.compile(make(), dynamic=False)

    # -- right or wrong

    def _wrong(self, models: dict[str, Callable]) -> dict[str, str]:
        """Backends whose loss or gradient without dropout is further from float64's than twice plain torch's."""
        truth = self._loss_and_norm(self._ours(self._ops("torch"), torch.float64))
        plain = self._loss_and_norm(self._plain())
        rounding = 2 * torch.finfo(self.case.dtype).eps  # sums in another order end a few roundings apart
        reasons = {}
        for name, make in models.items():
            if name.startswith("torch.compile"):
                continue  # compiled from what is checked, and compiling it twice takes a minute
            found = self._loss_and_norm(make())
            for what, exact, yardstick, value in zip(("loss", "gradient's norm"), truth, plain, found, strict=True):
                limit = 2 * abs(yardstick - exact) + rounding * exact
                if not abs(value - exact) <= limit:
                    reasons[name] = f"wrong: the {what} is {value:.5g}, in float64 {exact:.5g}, allowed {limit:.1e}"
            _free(self.clock)
        return reasons

    def _loss_and_norm(self, model: nn.Module) -> tuple[float, float]:
        loss = model.eval()(self.ids[:2], self.targets[:2])
        loss.backward()
        norms = [p.grad.double().norm() for p in model.parameters()]
        return loss.item(), torch.stack(norms).norm().item()

    # -- where the time goes

    def _contributions(self, ms: float) -> dict[str, float]:
        """By how many ms a step gets longer when one operation is plain torch's, of each that is not."""
        ours, plain = self._ops("triton"), self._ops("torch")
        names = [f.name for f in dataclasses.fields(Ops) if f.name not in ("name", "reason")]
        changed = [name for name in names if getattr(ours, name) is not getattr(plain, name)]
        found = {}
        for label in dict.fromkeys(_family(name) for name in changed):
            family = {name: getattr(plain, name) for name in changed if _family(name) == label}
            step = self._step(self._ours(dataclasses.replace(ours, **family)))
            for _ in range(WARM_UP):
                step()
            found[label] = statistics.median(self._block(step)) - ms
            del step
            _free(self.clock)
        return found

    def _memory(self, n: int) -> float:
        """The share of the device's memory that n models and their optimisers take."""
        if not self.clock.on_gpu:
            return 0.0
        total = torch.cuda.get_device_properties(self.device).total_memory
        return n * _BYTES_A_PARAMETER * self.case.config.n_params() / total


def _family(name: str) -> str:
    return "attention" if "attention" in name else name


def _free(clock: Clock) -> None:
    gc.collect()
    torch._dynamo.reset()
    if clock.on_gpu:
        torch.cuda.empty_cache()


STEP_FIELDS = (
    *("model", "dims", "dtype", "dropout", "backend", "status", "reason", "ms", "p20", "p80", "tokens_per_s", "mfu"),
    *("best_peer", "speedup", "speedup_low", "speedup_high", "peak_mb", "kinds", "without"),
)
