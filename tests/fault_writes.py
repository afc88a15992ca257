"""Saves whose k-th operation on the disk fails, for every k: what the fault matrix asks of the disk."""

import errno
import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from checkpoint_common import folder
from failing_disk import DISK
from several_runs import case, launch

from megagpt import dist
from megagpt.train import manifest

ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT")
# What is written depends on the stage of ZeRO: of all kinds of runs one of each stage is taken, or fewer.
AT_ONCE, IN_BACKGROUND = ("zero0_fp32", "zero1_bf16", "zero2_fp16", "zero3_bf16"), ("zero2_fp16", "zero3_bf16")
TOLD = "told, the run goes on"


def writes(home: Path, configs: list[str], most: int | None = None, background: bool = False) -> Iterator[str]:
    """Saves on two ranks, of which the first ``most`` operations, or all, fail one after the other; a line a case."""
    more = ["--async_save"] if background else []
    flags = {"max_steps": 10**6, "schedule": "warmup_constant", "keep_last": 2}
    taken = IN_BACKGROUND if background else AT_ONCE
    configs = [config for config in configs if config in taken] or configs
    each = functools.partial(fail_each, most=most, background=background)
    told = launch({c: case(home / c, c, *more, prepare=each, until=1, **flags) for c in configs})[0]
    endless = {}
    for config in configs:
        assert f"{config} is done" in told, told[-3000:]
        lines = re.findall(rf"^{config}: (rank \d operation .*)$", told, re.MULTILINE)
        yield from (f"{config}: {line}" for line in lines)
        for part in ("model_states.pt", "rng_rank_1.pt", manifest.STATE, manifest.MANIFEST, manifest.LATEST):
            written = any(" write " in line and part in line for line in lines)
            assert written or most, f"{config}: nobody has seen how {part} is written"
        failing = [tuple(map(int, re.findall(r"\d+", line)[:2])) for line in lines if TOLD in line]
        for i, error in enumerate(ERRORS):
            rank, number = failing[i * (len(failing) - 1) // (len(ERRORS) - 1)]
            name = f"{config}: rank {rank} operation {number} fails for ever with {error}"
            prepare = functools.partial(fail_for_ever, rank, number, error)
            endless[name] = error, case(home / name, config, *more, prepare=prepare, **flags)
    told = launch({name: how for name, (_, how) in endless.items()})
    for name, (error, _) in endless.items():
        for output in told:
            end = next((line for line in output.splitlines() if line.startswith(f"{name} ends with 7: ")), "")
            assert words(error) in end, f"{name}: {output[-3000:]}"
        given_up = [line for line in told[0].splitlines() if "failed, going on: " in line and str(home / name) in line]
        assert len(given_up) == 2, f"{name}: {given_up}"
        root = home / name / manifest.FOLDER
        assert manifest.problem(folder(home / name, 1)) is None, f"{name}: the older checkpoint is not as it was"
        assert not list(root.glob(".*")), f"{name}: {list(root.glob('.*'))} eat the space that is missing"
        yield f"{name}: code 7 after the third save, the older checkpoint is good"


def words(error: str) -> str:
    return os.strerror(getattr(errno, error))


# in the ranks ----------------------------------------------------------------------------------------------------


def fail_each(name: str, loop, *, most: int | None, background: bool) -> None:
    """Train with a save at each step, in which one operation after the other of either rank fails.

    First it fails with ENOSPC in a save and when that is tried again, then once with another error in the next save.
    In the ``background`` a save is tried once: it fails, and the next one is well.
    """
    trial, errors = _Trial(loop), itertools.cycle(ERRORS if background else ERRORS[1:])
    for victim in range(2):
        for number in range(1, (most or 10**9) + 1):
            error = next(errors) if background else "ENOSPC"
            refused = trial.step(victim, number, error, times=1 if background else 2)
            if not refused:
                break
            outcome = trial.check(refused, error)
            if background:
                trial.check(trial.step(victim, 0, error, times=0), error)
            else:
                once = next(errors)
                outcome += f"; {once} once: {trial.check(trial.step(victim, number, once, times=1), once)}"
            print(f"{name}: rank {victim} operation {number} of a save, {refused[0]}: {outcome}")


def fail_for_ever(victim: int, number: int, error: str, name: str, loop) -> None:
    """A first checkpoint, and then every save of the rank ``victim`` fails from one of its operations on."""
    DISK.insert(loop.root)
    loop.advance()
    loop.saver.settle()
    DISK.refuse(number if int(os.environ["RANK"]) == victim else 0, error, times=None)


class _Trial:
    """Steps of a run, each with a save that fails in some way, and what is left then."""

    def __init__(self, loop) -> None:
        DISK.insert(loop.root)
        self.loop, self.said = loop, []
        say = loop.saver._say
        loop.saver._say = lambda text: (self.said.append(text), say(text))
        loop.advance()
        self.good = loop.state.step  # of the newest complete checkpoint

    def step(self, victim: int, number: int, error: str, times: int) -> list[str]:
        """One step and its save; what was refused of it."""
        self.said.clear()
        DISK.refuse(number if int(os.environ["RANK"]) == victim else 0, error, times)
        self.loop.advance()
        self.loop.saver.settle()
        return dist.gather_json(DISK.refused)[victim]

    def check(self, refused: list[str], error: str) -> str:
        """What became of the save. Fails where what was said or what is on disk is not as it should be.

        What is part of the checkpoint cannot be done without. Two threads write its files: the same number is not
        always the same operation.
        """
        step, root = self.loop.state.step, self.loop.root
        what = f"step {step}, {error} at {refused}, said {self.said}"
        needed = [operation for operation in refused if f".tmp-{manifest.tag_name(step)}" in operation]
        failed = [line for line in self.said if f"checkpoint of step {step} failed" in line]
        assert all(words(error) in line for line in failed), what
        assert len(needed) <= len(failed) <= len(refused), what
        given_up = any("failed, going on: " in line for line in failed)
        self.good = self.good if given_up else step
        if dist.is_main():
            problem = manifest.problem(root / manifest.tag_name(self.good))
            assert problem is None, f"{what}: global_step{self.good}: {problem}"
            assert not list(root.glob(".*")), f"{what}: left over: {list(root.glob('.*'))}"
        return TOLD if given_up else "tried again" if failed else "done without"
