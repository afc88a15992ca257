"""Whole training steps (forward, backward, optimiser) of the presets under each backend, without DeepSpeed.

Weights are 16-bit with 32-bit masters, as DeepSpeed keeps them, and the same AdamW updates them under every backend.
"""

import dataclasses
import functools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator

import gpu_peers
import gpu_profile
import timing
import torch
from gpu_backends import Backends, Case, cases
from gpu_clock import Clock, free
from gpu_measure import against_peers, name_of
from gpu_report import Report, steps_table
from gpu_step import Step, fastest_sdpa
from torch import Tensor, nn

from megagpt.ops import Ops
from megagpt.train.hardware import peak_flops

ROUNDS, WARM_UP = 3, 5
_CASE_S = 25  # that a case takes at least, about
_MUST = 3  # the first cases: what compiles long in one of them leaves the others their time
_BYTES_A_PARAMETER = 22  # weight and gradient in 16 bits, master, its gradient and two moments in 32


def measure_models(
    clock: Clock, report: Report, wanted: tuple[str, ...], deadline: float, *, quick: bool
) -> Iterator[None]:
    """Add a record for each case and backend to ``report``; yields after each case."""
    todo = cases(clock.device, quick)
    for i, case in enumerate(todo):
        if time.monotonic() + (_CASE_S if clock.on_gpu else 0) > deadline:
            report.skipped.append(f"model: {case}")
            continue
        compile_until = deadline - _CASE_S * max(0, min(_MUST, len(todo)) - i - 1)
        try:
            bench = Bench(case, clock, compile_until, *((1, 1) if quick else (ROUNDS, WARM_UP)))
            records = bench.measure(wanted, contributions=i == 0 and not quick)
        except Exception as error:  # the rest is still worth measuring
            traceback.print_exc()
            report.failed.append(f"model, {case}: {gpu_peers.first_line(error)}")
            records = []
        report.steps += records
        if records:
            print(f"\n{steps_table(records)}", flush=True)
        free(clock)
        yield


class Bench:
    """Times the backends of one case."""

    def __init__(self, case: Case, clock: Clock, deadline: float, rounds: int, warm_up: int) -> None:
        self.case, self.clock, self.rounds, self.warm_up = case, clock, rounds, warm_up
        self.backends = Backends(case, clock, deadline)
        heads = (case.B, case.config.seq_len, case.config.n_head, case.config.head_width)
        self.sdpa = fastest_sdpa(clock, heads, case.dtype, case.dropout)

    def measure(self, wanted: tuple[str, ...], *, contributions: bool) -> list[dict]:
        """A record for each backend; with ``contributions`` ours tells what each of its operations is worth."""
        models, absent = gpu_peers.collect(self.backends.makers(), wanted)
        records = [self._record(name, status="absent", reason=reason) for name, reason in absent.items()]
        wrong = self.backends.wrong(models)
        records += [self._record(name, status="wrong", reason=reason) for name, reason in wrong.items()]
        right = {name: make for name, make in models.items() if name not in wrong}
        # Side by side, so that they can take turns, where the device's memory allows it.
        groups = [right] if self._memory(len(right)) < 0.4 else [{name: make} for name, make in right.items()]
        samples, notes, failed = {}, {}, {}
        for group in groups:
            self._measure_group(group, samples, notes, failed)
        records += [self._record(name, status="cannot run", reason=reason) for name, reason in failed.items()]
        rounds = {name: [statistics.median(each) for each in values] for name, values in samples.items()}
        if contributions and "megagpt" in samples:
            notes["megagpt"]["without"] = self._contributions(statistics.median(rounds["megagpt"]))
        products = self._products_ms()
        for name, each in samples.items():
            times = self._rates(sorted(value for block in each for value in block))
            if self.clock.on_gpu and notes[name]["kinds"]:  # what is left of a step is time in which the GPU waits
                notes[name]["kinds"]["idle"] = max(0.0, times["ms"] - sum(notes[name]["kinds"].values()))
            records.append(
                self._record(
                    name, status="timed", **times, **against_peers(name, rounds), **notes[name], products_ms=products
                )
            )
        return records

    def _measure_group(self, models: dict[str, Callable], samples: dict, notes: dict, failed: dict) -> None:
        """Times of models that take turns go to ``samples``, what else there is to tell of them to ``notes``."""
        steps = {}
        for name, make in models.items():
            try:
                step = self._step(make())
                notes[name] = {"peak_mb": self.clock.peak_mb(functools.partial(self._warm_up, step))}
                steps[name] = step
            except Exception as error:  # the memory may not suffice, a compiler may give up
                failed[name] = gpu_peers.first_line(error)
        blocks = {name: functools.partial(self._block, step) for name, step in steps.items()}
        samples |= timing.interleave(blocks, self.rounds)
        for name, step in steps.items():
            notes[name] |= {"kinds": self._kinds(step), "without": {}}
        steps.clear(), blocks.clear()  # and with them the models
        free(self.clock)

    def _kinds(self, step: Step) -> dict[str, float]:
        try:
            return gpu_profile.kinds(step, self.clock.device)
        except RuntimeError as error:  # a machine may refuse to be profiled; the times stand without it
            print(f"where the time goes is not known: {gpu_peers.first_line(error)}", flush=True)
            return {}

    def _step(self, model: nn.Module) -> Step:
        return Step(model, self.backends.ids, self.backends.targets, self.sdpa)

    def _warm_up(self, step: Step) -> None:
        for _ in range(self.warm_up):
            step()

    def _block(self, step: Step) -> list[float]:
        return self.clock.runs(step, self.case.steps)

    def _contributions(self, ms: float) -> dict[str, float]:
        """By how many ms a step gets longer when one operation is plain torch's, of each that is not."""
        ours, plain = self.backends.ops("triton"), self.backends.ops("torch")
        names = [f.name for f in dataclasses.fields(Ops) if f.name not in ("name", "reason")]
        changed = [name for name in names if getattr(ours, name) is not getattr(plain, name)]
        found = {}
        for label in dict.fromkeys(_family(name) for name in changed):
            family = {name: getattr(plain, name) for name in changed if _family(name) == label}
            step = self._step(self.backends.ours(dataclasses.replace(ours, **family)))
            self._warm_up(step)
            found[label] = statistics.median(self._block(step)) - ms
            del step
            free(self.clock)
        return found

    def _products_ms(self) -> float:
        """What the projections of a step would take alone, forward and backward, timed at their shapes."""
        config = self.case.config
        rows, D = self.case.B * config.seq_len, config.d_model
        shapes = {(D, 3 * D): config.n_layer, (D, D): config.n_layer, (D, config.d_ff): config.n_layer}
        shapes |= {(config.d_ff, D): config.n_layer, (D, config.vocab_size): 1}
        total = 0.0
        for (n_in, n_out), times in shapes.items():
            x, w, y = (self._random(*shape) for shape in ((rows, n_in), (n_in, n_out), (rows, n_out)))
            for work in (lambda x=x, w=w: x @ w, lambda w=w, y=y: y @ w.mT, lambda x=x, y=y: x.mT @ y):
                total += times * statistics.median(self.clock.samples(work))
        return total

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.clock.device).to(self.case.dtype)

    def _memory(self, n: int) -> float:
        """The share of the device's memory that n models and their optimisers take."""
        if not self.clock.on_gpu:
            return 0.0
        total = torch.cuda.get_device_properties(self.clock.device).total_memory
        return n * _BYTES_A_PARAMETER * self.case.config.n_params() / total

    def _rates(self, values: list[float]) -> dict:
        """Of sorted times in ms: the median and what follows from it."""
        case, ms = self.case, statistics.median(values)
        tokens_per_s = 1e3 * case.B * case.config.seq_len / ms
        device = torch.cuda.get_device_name(self.clock.device) if self.clock.on_gpu else ""
        peak = peak_flops(device, name_of(case.dtype))
        return {
            "ms": ms,
            "p20": values[int(0.2 * (len(values) - 1))],
            "p80": values[round(0.8 * (len(values) - 1))],
            "tokens_per_s": tokens_per_s,
            "mfu": case.config.flops_per_token() * tokens_per_s / peak if peak else None,
        }

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


def _family(name: str) -> str:
    return "attention" if "attention" in name else name


STEP_FIELDS = (
    *("model", "dims", "dtype", "dropout", "backend", "status", "reason", "ms", "p20", "p80", "tokens_per_s", "mfu"),
    *("best_peer", "speedup", "speedup_low", "speedup_high", "peak_mb", "products_ms", "kinds", "without"),
)
