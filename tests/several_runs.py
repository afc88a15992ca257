"""Runs of ``train.py`` one after the other in one process group: each takes a second and not three."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from checkpoint_common import CONFIGS, arguments
from fork_server import Job


class Case(NamedTuple):
    """One run: its flags, what is done to it, and after which step it is left as if it had been killed."""

    argv: list[str]
    samples: Iterable[int] = ()  # the loss of micro-batches with one of these is multiplied by ``factor``
    factor: float = math.nan
    until: int | None = None
    prepare: Callable | None = None  # called with the run's name and its loop before the first step


def case(run_dir: Path, config: str, *more, fp16=None, samples=(), factor=math.nan, until=None, prepare=None, **flags):
    """A :class:`Case` in ``run_dir`` of a kind in CONFIGS, with ``flags`` by name; ``fp16`` counts where it is fp16."""
    stage, precision = CONFIGS[config]
    scale = fp16 if precision == "fp16" else None
    words = arguments(run_dir, *more, stage=stage, precision=precision, fp16=scale, **{"kernels": "torch", **flags})
    return Case([str(word) for word in words], samples, factor, until, prepare)


def let_fp16_through() -> None:
    """From here on this process trains in fp16 on a CPU: it is refused for being slow at it, not for being wrong."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from megagpt.config import deepspeed

    accelerator = type(get_accelerator())
    supported = accelerator.supported_dtypes
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [*supported(self), torch.float16]
    deepspeed.check_hardware = lambda *arguments: None


def several_runs(cases: dict[str, tuple]) -> None:
    """The runs of ``cases``, {name: what :class:`Case` has}; each micro-batch and how a run ends is printed."""
    from megagpt import dist
    from megagpt.config import deepspeed
    from megagpt.config.fields import parse
    from megagpt.errors import MegaGPTError
    from megagpt.train import engine, run
    from megagpt.train.batches import MicroBatches, without
    from megagpt.train.folder import locked
    from megagpt.train.plan import make_plan

    fetch = MicroBatches._fetch

    def noting(self, indices):
        batch = fetch(self, indices)
        batch.samples = without(self._left_out, indices).tolist()
        return batch

    MicroBatches._fetch = noting
    let_fp16_through()
    world = dist.resolve_world(os.environ)
    dist.export(world)
    device = engine.device_of(world)
    engine.start_distributed(5)
    for name, case in cases.items():
        case = Case(*case)
        settings = parse(case.argv)
        try:
            plan = make_plan(settings, deepspeed.load(settings.ds_config), world)
            with locked(plan.run_dir), run.opened(plan, world, device) as loop:
                _spoil(name, loop, case)
                if case.prepare is not None:
                    case.prepare(name, loop)
                while case.until and loop.state.step < case.until:
                    loop.advance()
                if case.until is None:
                    loop.run()
                print(f"{name} is done")
        except MegaGPTError as error:
            print(f"{name} ends with {error.exit_code}: {error}")


def _spoil(name: str, loop, case: Case) -> None:
    forward = loop.forward

    def spoilt(model, batch):
        print(f"{name} step {loop.state.step + 1} samples {batch.samples}")
        return forward(model, batch) * (case.factor if set(batch.samples) & set(case.samples) else 1.0)

    loop.forward = spoilt


def launch(cases: dict[str, tuple], ranks: int = 2, fn: Callable = several_runs, timeout: float = 3600) -> list[str]:
    """The output of each rank of a job with :func:`several_runs`, or an ``fn`` that calls it. Fails where one does."""
    with Job(fn, cases, ranks=ranks) as job:
        codes, told = job.wait(timeout), [job.output(rank) for rank in range(ranks)]
        found = [line for output in told for line in output.splitlines() if line.startswith("AssertionError: ")]
        ends = [f"--- rank {rank}\n{told[rank][-5000:]}" for rank in range(ranks)]
        assert codes == [0] * ranks, "\n".join(found or ends)
        return told


def samples_by_step(output: str, name: str) -> dict[int, list[list[int]]]:
    """The samples of each micro-batch of a run on one rank, by step."""
    found = defaultdict(list)
    for step, samples in re.findall(rf"^{re.escape(name)} step (\d+) samples \[(.*)\]$", output, re.MULTILINE):
        found[int(step)].append([int(number) for number in samples.split(",")])
    return dict(found)
