"""Losses and gradients that are not finite, in six ways: what the fault matrix asks of the numbers."""

import functools
import hashlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from checkpoint_common import tensors_in
from several_runs import case, launch

from megagpt.train import manifest, metrics

STEPS, BAD = 8, 4
BATCH = 8  # samples of a step, in two micro-batches of two ranks
LOWEST = {"initial_scale_power": 33, "min_loss_scale": 2**32, "hysteresis": 1}


class Way(NamedTuple):
    """What is not finite, and what has to follow from it."""

    samples: range | tuple = ()  # whose losses are not
    factor: float = math.nan
    gradients: bool = False  # at the step BAD on rank 1, in one element of one parameter
    bad: range | tuple = (BAD,)  # the steps that are skipped
    stops: str = ""  # the words with which the run ends; "" where it goes on to its end


def _of_step(step: int) -> range:
    return range(BATCH * (step - 1), BATCH * step)


_THIRDS = range(3, 91, 3)
WAYS = {
    "NaN once": Way(_of_step(BAD)),
    "NaN ten times in a row": Way(range(BATCH * (BAD - 1), 999), bad=range(BAD, BAD + 10), stops="10 updates in a row"),
    "NaN on one rank": Way((BATCH * (BAD - 1) + 3,)),
    "NaN in gradients alone": Way(gradients=True),
    "Inf": Way(_of_step(BAD), factor=math.inf),
}
# What is left of each precision.
MANY = Way(tuple(i for step in _THIRDS for i in _of_step(step)), bad=_THIRDS, stops="30 of the last 100 updates")
FLOOR = Way(stops="", bad=range(1, 99))


def ways(config: str) -> dict[str, Way]:
    if config.endswith("fp16"):
        return {**WAYS, "no lower loss scale": FLOOR}
    return {**WAYS, "NaN thirty times of a hundred": MANY}


def numbers(home: Path, configs: list[str], only: str | None = None) -> Iterator[str]:
    """Runs whose losses or gradients are not finite; a line a case."""
    cases = {}
    for config in configs:
        for kind, way in ways(config).items():
            if only in (None, kind):
                name = f"{config}, {kind}"
                scale = LOWEST if way is FLOOR else {"initial_scale_power": 12}
                flags = {"max_steps": STEPS if way.bad == (BAD,) else 99, "save_interval": 8 if way is MANY else 1}
                flags |= {"global_batch_size": BATCH, "warmup_steps": 6, "compare_ranks_interval": 1, "keep_last": 99}
                prepare = functools.partial(watch, gradients=way.gradients)
                spoilt = {"samples": way.samples, "factor": way.factor, "prepare": prepare}
                cases[name] = config, way, case(home / name, config, fp16=scale, **spoilt, **flags)
    told = launch({name: how for name, (_, _, how) in cases.items()})
    for name, (config, way, _) in cases.items():
        yield f"{name}: {_check(home / name, name, config, way, told)}"


def _check(run_dir: Path, name: str, config: str, way: Way, told: list[str]) -> str:
    for rank, output in enumerate(told):
        digests = re.findall(rf"^{re.escape(name)} holds (\w+)$", output, re.MULTILINE)
        last = len(digests) - 1  # the first one is of before the first step
        moved = [step for step in range(1, last + 1) if digests[step] != digests[step - 1]]
        expected = [step for step in range(1, last + 1) if step not in way.bad]
        assert moved == expected, f"{name}: rank {rank} updated weights or states in steps {moved}, not {expected}"
        if way is FLOOR:
            assert 1 <= last <= 12, f"{name}: went on to step {last}"
            end = rf"^{re.escape(name)} ends with 6: step {last}: "
        else:
            assert last == (way.bad[-1] if way.stops else STEPS), f"{name}: ended at step {last}\n{output[-3000:]}"
            end = f"ends with 6: step {last}: {way.stops}" if way.stops else "is done"
            end = rf"^{re.escape(name)} {end}"
        assert re.search(end, output, re.MULTILINE), f"{name}, rank {rank}: {output[-3000:]}"
    if way is FLOOR:
        return f"code 6 at step {last}, weights and states untouched"
    records = {record["step"]: record for record in metrics.read(run_dir / metrics.NAME) if "loss" in record}
    # A finite loss and gradients that overflow are how fp16 finds its scale.
    searches = way.gradients and config.endswith("fp16")
    for step, record in records.items():
        skipped = len([bad for bad in way.bad if bad <= step])
        counted = record["skipped_steps"], record["nan_steps"]
        assert counted == (skipped, 0 if searches else skipped), f"{name}: step {step} counted {counted}"
    saved = {manifest.step_of(path) for path in manifest.folders(run_dir / manifest.FOLDER)}
    good = {step for step in range(1, last + 1) if searches or step not in way.bad}
    due = range(8, 99, 8) if way is MANY else good
    assert saved == good.intersection(due), f"{name}: saved {sorted(saved)}"
    if way.stops:
        assert (run_dir / "numeric_stop.json").exists(), f"{name}: nothing was written down"
        return f"code 6 at step {last}, {len(way.bad)} skipped on both ranks"
    rates = [records[step]["lr"] for step in (BAD - 1, BAD, BAD + 1)]
    assert rates[0] != rates[1] == rates[2], f"{name}: the rate went on: {rates}"
    return "skipped on both ranks, the run goes on"


# in the ranks ----------------------------------------------------------------------------------------------------


def watch(name: str, loop, *, gradients: bool) -> None:
    """Print a hash of all weights and optimiser states before the first step and after each one."""
    advance = loop.advance

    def watched() -> None:
        try:
            advance()
        finally:
            print(f"{name} holds {digest(loop.engine)}")

    loop.advance = watched
    print(f"{name} holds {digest(loop.engine)}")
    if gradients and os.environ["RANK"] == "1":

        def spoil(gradient):
            if loop.state.step + 1 == BAD:
                gradient = gradient.clone()
                gradient.view(-1)[0] = math.nan
            return gradient

        next(p for n, p in loop.engine.module.named_parameters() if n.endswith("weight")).register_hook(spoil)


def digest(engine) -> str:
    """A hash of what this rank holds of the weights and of the optimiser's states."""
    import torch

    found = {n: getattr(p, "ds_tensor", p) for n, p in engine.module.named_parameters()}
    found |= tensors_in(engine.optimizer.state_dict(), "states")
    total = hashlib.sha256()
    for tensor in found.values():
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
