"""Runs of two ranks that are killed again and again, and what has to come out: the run that nobody disturbed.

    python tests/chaos.py [--kills 50] [--seed 0] [--only zero2_fp16]

A chain is one run: each start is killed (-9, one rank or both, at a named place of a save or at a random moment while
saves are slowed down) until its kills are used up, then it may end. Every start has to go on from the newest complete
checkpoint, and the end has to equal an undisturbed run bit for bit. Kills are shared out over ZeRO 0 to 3 and fp32,
bf16 and fp16, every other one at a place: from 552 on each place is met, on each rank, in each of the twelve.
``make chaos N=50`` does it, and tells after every chain how far it is.
"""

import argparse
import functools
import itertools
import json
import random
import shutil
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path

from checkpoint_common import CONFIGS, arguments, curve, tensors
from fork_server import Job, train_main
from several_runs import let_fp16_through

from megagpt.train import faults, manifest

STEPS, KEEP = 16, 2
MOST = 12  # kills of one run
PLACES = [(place, rank) for place in faults.EVERY_RANK for rank in (0, 1)] + [(place, 0) for place in faults.RANK_0]
SETUP, TRAINING = "setup", "training"  # a random moment of it
SLOW = "*::0:sleep0.02"  # saves take the greater part of the time
PATIENCE = 300.0  # seconds for one start; a rank that hangs is an error of its own


@dataclass
class Pace:
    """Seconds that a start took to its first step, and for a step and its save, when it was last seen to do so."""

    setup: float
    step: float


@dataclass
class Tally:
    """What happened."""

    kills: Counter = field(default_factory=Counter)
    starts: int = 0
    chains: int = 0
    lost: list[int] = field(default_factory=list)  # steps that a kill cost
    ended: list[float] = field(default_factory=list)  # seconds from the death of a rank to the end of its peer

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} of {who}" for who, n in sorted(self.kills.items()))
        lost, ended = self.lost or [0], sorted(self.ended) or [0.0]
        return (
            f"{self.kills.total()} kills ({kinds}) in {self.starts} starts of {self.chains} runs, no differing bit; "
            f"steps lost by a kill: mean {sum(lost) / len(lost):.2f}, most {max(lost)}; from a rank's death to the end "
            f"of its peer: median {ended[len(ended) // 2]:.2f} s, most {ended[-1]:.2f} s"
        )


def allow_fp16(argv: list[str]) -> int:
    """``train.py`` where a CPU is let through with fp16."""
    let_fp16_through()
    return train_main(argv)


def start(
    run_dir: Path, stage: int, precision: str, fault: str | None = None, asynchronous: bool = False, **changes
) -> Job:
    """One start of the run of two ranks in ``run_dir``, with saves in the background if ``asynchronous``.

    ``changes`` are flags by name.
    """
    flags = arguments(
        run_dir,
        *(["--async_save"] if asynchronous else []),
        stage=stage,
        precision=precision,
        **{"max_steps": STEPS, "keep_last": KEEP, "kernels": "torch", **changes},
    )
    return Job(allow_fp16, [str(word) for word in flags], env={faults.VARIABLE: fault})


@functools.cache
def undisturbed(folder: Path, stage: int, precision: str) -> tuple[Path, Pace]:
    """The run folder of a run that nobody disturbed, and how long it took."""
    with Job(int, ranks=1) as job:  # the server of forked processes has come up
        job.wait(PATIENCE)
    run_dir = folder / f"zero{stage}_{precision}"
    with start(run_dir, stage, precision) as job:
        job.wait_for("run folder", rank=0, timeout=PATIENCE)
        set_up = time.monotonic()
        assert job.wait(PATIENCE) == [0, 0], job.output()
        step = (time.monotonic() - set_up) / STEPS
        return run_dir, Pace(set_up - job.begun, step + 0.02 * len(faults.EVERY_RANK + faults.RANK_0))


def chain(
    folder: Path,
    stage: int,
    precision: str,
    kills: deque,
    rng: random.Random,
    tally: Tally,
    *,
    asynchronous: bool = False,
) -> None:
    """One run, killed as the first of ``kills`` say (each is (place, rank), SETUP or TRAINING), which are taken away.

    There may be some left when the run is at its end. Fails where it ends in another way than undisturbed.
    """
    whole, pace = undisturbed(folder, stage, precision)
    run_dir = folder / f"chain{tally.chains}_zero{stage}_{precision}"
    what = f"ZeRO-{stage} {precision}, {'saved in the background' if asynchronous else 'saved at once'}"
    done: list = []
    while kills and len(done) < MOST:
        slow = SLOW if kills[0] in (SETUP, TRAINING) else f"{kills[0][0]}:{kills[0][1]}:1"
        if not _killed(kills[0], start(run_dir, stage, precision, slow, asynchronous), run_dir, pace, rng, tally):
            assert done, f"{kills[0]} was never reached; {what}"
            break
        done.append(kills.popleft())
    else:
        complete = newest(run_dir)
        with start(run_dir, stage, precision, None, asynchronous) as job:
            tally.starts += 1
            assert job.wait(PATIENCE) == [0, 0], job.output()
            check_went_on(job, complete)
    compare(run_dir, whole, f"{what} after {done}")
    shutil.rmtree(run_dir)
    tally.chains += 1


def _killed(kill, job: Job, run_dir: Path, pace: Pace, rng: random.Random, tally: Tally) -> bool:
    """Kill a start as ``kill`` says; False where the run came to its end before."""
    complete = newest(run_dir)
    with job:
        tally.starts += 1
        if kill in (SETUP, TRAINING):
            strike(job, kill, pace, rng)
        connection.wait([process.sentinel for process in job.processes], PATIENCE)
        died = time.monotonic()
        codes = job.wait(PATIENCE)
        seconds = time.monotonic() - died
        check_went_on(job, complete)
        if -9 not in codes:
            assert codes == [0, 0], job.output()
            return False
        after = newest(run_dir)
        # At the very end a rank has nothing left for which it would need the other one.
        assert all(codes) or after == STEPS, f"a rank ended well though its peer was killed: {codes}\n{job.output()}"
        assert kill in (SETUP, TRAINING) or codes[kill[1]] == -9, f"{kill} killed {codes}\n{job.output()}"
    tally.kills["both ranks" if codes == [-9, -9] else "one rank"] += 1
    if codes != [-9, -9]:
        tally.ended.append(seconds)
    tally.lost.append(max(0, logged(run_dir) - after))
    return True


def strike(job: Job, when: str, pace: Pace, rng: random.Random) -> None:
    """Kill both ranks at a random moment of their setup, or one or both within about two steps; none that has ended."""
    ranks, moment = (0, 1), job.begun + rng.uniform(0, pace.setup)
    if when == TRAINING:
        while "run folder" not in job.output(0) and all(process.is_alive() for process in job.processes):
            time.sleep(0.005)
        set_up = time.monotonic()
        pace.setup = set_up - job.begun
        ranks, moment = rng.choice([(0,), (1,), (0, 1)]), set_up + rng.uniform(0, 2 * pace.step)
    connection.wait([process.sentinel for process in job.processes], max(0.0, moment - time.monotonic()))
    if all(process.is_alive() for process in job.processes):
        for rank in ranks:
            job.processes[rank].kill()
    if when == TRAINING and (steps := job.output(0).count("] saved ")):
        pace.step = (time.monotonic() - set_up) / steps


def check_went_on(job: Job, complete: int, steps: int = STEPS) -> None:
    """Fail where a start has not gone on from the newest checkpoint that was complete."""
    output = job.output(0)
    if "run folder" in output:
        assert f", step {complete} of {steps}" in output, f"{complete} was the newest complete one\n{output}"


def compare(run_dir: Path, whole: Path, what: str, steps: int = STEPS) -> None:
    """Fail where a run has not ended as an undisturbed one."""
    ours, theirs = curve(run_dir), curve(whole)
    differing = [f"{a} and not {b}" for a, b in zip(ours, theirs, strict=False) if a != b]
    assert not differing, f"{what}: {differing[0]}"
    assert len(ours) == len(theirs), f"{what}: the log has {len(ours)} lines and not {len(theirs)}"
    final = Path(manifest.FOLDER, manifest.tag_name(steps))
    ours, theirs = tensors(run_dir / final), tensors(whole / final)
    assert ours.keys() == theirs.keys(), what
    differing = [name for name, tensor in ours.items() if not tensor.equal(theirs[name])]
    assert not differing, f"{what}: {differing[:5]}"
    assert not list((run_dir / manifest.FOLDER).glob(".*")), f"{what}: what the killed starts left is gone"


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


def share_out(kills: int, rng: random.Random, configs: list[tuple[int, str]]) -> dict[tuple[int, str], deque]:
    """The kills of every kind of run: every other one at a place, one in ten while a start sets up."""
    places = itertools.cycle(PLACES)
    planned = {}
    for i, config in enumerate(configs):
        n = kills // len(configs) + (i < kills % len(configs))
        planned[config] = [next(places) if j % 2 == 0 else SETUP if j % 10 == 9 else TRAINING for j in range(n)]
        rng.shuffle(planned[config])
    return {config: deque(ours) for config, ours in planned.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CONFIGS, help="one kind of run")
    args = parser.parse_args()
    rng, tally = random.Random(args.seed), Tally()
    configs = [CONFIGS[args.only]] if args.only else list(CONFIGS.values())
    planned = share_out(args.kills, rng, configs)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megagpt-chaos-") as folder:
        for turn in itertools.count():
            waiting = [(i, config) for i, config in enumerate(configs) if planned[config]]
            if not waiting:
                break
            for i, (stage, precision) in waiting:
                asynchronous = (i + turn) % 2 == 1
                chain(Path(folder), stage, precision, planned[stage, precision], rng, tally, asynchronous=asynchronous)
                seconds = time.monotonic() - begun
                print(f"[{seconds:.0f} s] after ZeRO-{stage} {precision}: {tally}", flush=True)


if __name__ == "__main__":
    main()
