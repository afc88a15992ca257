"""Runs of two ranks that are killed again and again, and what has to come out: the run that nobody disturbed.

    python tests/chaos.py [--kills 50] [--seed 0]

A chain is one run: each start is killed (-9, one rank or all, at a named place of a save or at a random moment while
saves are slowed down) until its kills are used up, then it may end. Every start has to go on from the newest complete
checkpoint, and the end has to equal an undisturbed run bit for bit. ``make chaos N=50`` does it.
"""

import argparse
import collections
import functools
import itertools
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

from checkpoint_common import arguments, curve, tensors
from fork_server import Job, train_main

from megagpt.train import faults, manifest

STEPS, KEEP = 8, 2
CONFIGS = list(itertools.product(range(4), ("fp32", "bf16", "fp16")))
PLACES = [(place, rank) for place in faults.EVERY_RANK for rank in (0, 1)] + [(place, 0) for place in faults.RANK_0]
RANDOM = "random"
PATIENCE = 90.0  # seconds for one start


@dataclass
class Tally:
    """What happened."""

    kills: collections.Counter = field(default_factory=collections.Counter)
    starts: int = 0
    chains: int = 0
    lost: list[int] = field(default_factory=list)  # steps that a kill cost
    ended: list[float] = field(default_factory=list)  # seconds from the death of a rank to the end of its peer

    def __str__(self) -> str:
        n = self.kills.total()
        lost, ended = self.lost or [0], self.ended or [0.0]
        return (
            f"{n} kills in {self.starts} starts of {self.chains} runs: each ended as the undisturbed one, bit for "
            f"bit; steps lost by a kill: mean {sum(lost) / len(lost):.2f}, most {max(lost)}; from a death to the "
            f"end of the job: mean {sum(ended) / len(ended):.2f} s, most {max(ended):.2f} s"
        )


def allow_fp16(argv: list[str]) -> int:
    """``train.py`` where a CPU is let through with fp16: it is refused for being slow, not for being wrong."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from megagpt.config import deepspeed

    accelerator = type(get_accelerator())
    supported = accelerator.supported_dtypes
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [*supported(self), torch.float16]
    deepspeed.check_hardware = lambda *arguments: None
    return train_main(argv)


def start(run_dir: Path, stage: int, precision: str, fault: str | None = None, asynchronous: bool = False) -> Job:
    """One start of the run of two ranks in ``run_dir``, with saves in the background if ``asynchronous``."""
    flags = arguments(
        run_dir,
        *(["--async_save"] if asynchronous else []),
        stage=stage,
        precision=precision,
        max_steps=STEPS,
        keep_last=KEEP,
        n_layer=1,
        kernels="torch",
    )
    return Job(allow_fp16, [str(word) for word in flags], env={faults.VARIABLE: fault})


@functools.cache
def undisturbed(folder: Path, stage: int, precision: str) -> Path:
    """The run folder of a run that nobody disturbed."""
    run_dir = folder / f"zero{stage}_{precision}"
    with start(run_dir, stage, precision) as job:
        assert job.wait(PATIENCE) == [0, 0], job.output()
    return run_dir


def chain(
    folder: Path,
    stage: int,
    precision: str,
    kills: list,
    rng: random.Random,
    tally: Tally,
    *,
    asynchronous: bool = False,
) -> None:
    """One run killed as ``kills`` say, each (place, rank) or RANDOM; fails where it ends in another way."""
    run_dir = folder / f"chain{tally.chains}_zero{stage}_{precision}"
    for kill in [*kills, None]:
        complete = newest(run_dir)
        fault = {None: None, RANDOM: "*::0:sleep0.02"}.get(kill) if kill in (None, RANDOM) else f"{kill[0]}:{kill[1]}:1"
        with start(run_dir, stage, precision, fault, asynchronous) as job:
            tally.starts += 1
            died = strike(job, rng) if kill == RANDOM else None
            first = _first_death(job) if kill is not None else None
            codes = job.wait(PATIENCE)
            output = job.output(0)
            if kill is not None and (died is not None or kill != RANDOM):
                tally.ended.append(time.monotonic() - (died or first))
            if f"of {STEPS}" in output:
                assert f", step {complete} of {STEPS}" in output, f"{complete} was the newest complete one\n{output}"
            expected = [0, 0] if kill is None else None
            assert expected in (None, codes), job.output()
            if kill not in (None, RANDOM):
                assert codes[kill[1]] == -9, f"{kill} was never reached\n{job.output()}"
        if kill is not None and any(codes):
            assert all(codes), f"a rank ended well though its peer was killed: {codes}"
            tally.kills["all" if codes == [-9, -9] else "one"] += 1
            tally.lost.append(max(0, logged(run_dir) - newest(run_dir)))
    whole = undisturbed(folder, stage, precision)
    assert curve(run_dir) == curve(whole), f"ZeRO-{stage} {precision} after {kills}"
    final = Path("checkpoints", manifest.tag_name(STEPS))
    ours, theirs = tensors(run_dir / final), tensors(whole / final)
    assert ours.keys() == theirs.keys()
    differing = [name for name, tensor in ours.items() if not tensor.equal(theirs[name])]
    assert not differing, f"ZeRO-{stage} {precision} after {kills}: {differing[:5]}"
    assert not list((run_dir / "checkpoints").glob(".*")), "what the killed starts left is gone"
    shutil.rmtree(run_dir)
    tally.chains += 1


def strike(job: Job, rng: random.Random) -> float | None:
    """Kill one rank or all at a random moment after training began; when, or None where the run ended before."""
    moment = rng.uniform(0, 2.0)
    try:
        job.wait_for("run folder", rank=0, timeout=PATIENCE)
    except AssertionError:
        if any(process.is_alive() for process in job.processes):
            raise
        return None
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and all(process.is_alive() for process in job.processes):
        time.sleep(0.005)
    if not all(process.is_alive() for process in job.processes):
        return None
    ranks = rng.choice([(0,), (1,), (0, 1)])
    for rank in ranks:
        job.processes[rank].kill()
    return time.monotonic()


def _first_death(job: Job) -> float:
    connection.wait([process.sentinel for process in job.processes], PATIENCE)
    return time.monotonic()


def newest(run_dir: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    root = run_dir / manifest.FOLDER
    if not manifest.folders(root):
        return 0
    return manifest.step_of(manifest.newest_intact(root)[0])


def logged(run_dir: Path) -> int:
    """The last step in the log."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError):  # half-written
            continue
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, tally = random.Random(args.seed), Tally()
    planned = [*PLACES[: args.kills], *[RANDOM] * (args.kills - len(PLACES))]
    rng.shuffle(planned)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megagpt-chaos-") as folder:
        for stage, precision in itertools.cycle(CONFIGS):
            remaining = args.kills - tally.kills.total()
            if remaining <= 0:
                break
            kills, planned = planned[:6], planned[6:]
            kills = kills or [RANDOM] * min(6, remaining)
            asynchronous = tally.chains % 2 == 1
            chain(Path(folder), stage, precision, kills, rng, tally, asynchronous=asynchronous)
            how = "in the background" if asynchronous else "at once"
            print(f"ZeRO-{stage} {precision}, saved {how}: {tally.kills.total()} kills so far", flush=True)
    print(f"{tally}; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
