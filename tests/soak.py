"""One long run that is disturbed in every way at random moments; what has to come out is the run that nobody disturbed.

    python tests/soak.py [--steps 18000] [--every 4] [--seed 0]

Two ranks under ZeRO-2 in bf16 are killed, told to stop, interrupted, frozen, left with a damaged newest checkpoint or
with a disk that refuses a write, about every six seconds, until the run has reached its last step. Every start has to
go on from the newest intact checkpoint, every end has to have the code that belongs to it, and in the end the numbers
of every step and the last checkpoint have to be an undisturbed run's, bit for bit.
"""

import argparse
import random
import signal
import tempfile
import time
from collections import Counter
from multiprocessing import connection
from pathlib import Path

from chaos import check_went_on, compare, logged, newest, start
from checkpoint_common import flip_a_bit
from fork_server import Job

from megagpt.train import faults, manifest

SAVE_EVERY = 4
HANG = 20  # seconds after which a rank gives a frozen one up
PATIENCE = 120.0  # seconds for a start to end after a fault, on a busy machine
# (kind, how often, exit codes that may follow, of each rank). At its very end a rank needs the other one no more.
KINDS = {
    "one rank killed": (6, {-9, 4, 0}),
    "both ranks killed": (3, {-9}),
    "TERM to one rank": (3, {75}),
    "USR1 to both": (3, {75}),
    "Ctrl-C": (2, {130, 4}),
    "a rank frozen": (1, {5, 4, -9}),
    "killed, newest checkpoint damaged": (3, {-9}),
    "a write refused, later killed": (5, {-9, 4, 0}),
}
# At the other places nothing is written.
WRITES = sorted({*faults.EVERY_RANK, *faults.RANK_0} - {"save_begun", "shards_written", "ranks_agreed"})
REFUSALS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")


class Soak:
    """The run in ``folder`` and what has happened to it so far."""

    def __init__(self, folder: Path, steps: int, every: float, seed: int) -> None:
        self.rng, self.every, self.steps = random.Random(seed), every, steps
        self.run_dir, self.whole = folder / "disturbed", folder / "whole"
        self.faults: Counter = Counter()
        self.starts = self.computed = 0
        self.ends: list[float] = []  # seconds from a fault to the end of both ranks

    def start(self, run_dir: Path, fault: str | None = None) -> Job:
        flags = {"max_steps": self.steps, "save_interval": SAVE_EVERY, "keep_last": 3, "dropout": 0.1}
        return start(run_dir, 2, "bf16", fault, hang_timeout=HANG, **flags)

    def run(self) -> None:
        with self.start(self.whole) as job:
            assert job.wait(3600) == [0, 0], job.output()
        while not self._disturbed():
            if self.starts % 20 == 0:
                print(self, flush=True)
        compare(self.run_dir, self.whole, f"after {self.faults}", self.steps)

    def _disturbed(self) -> bool:
        """One start, to its fault or its end; whether it was the end."""
        kind = self.rng.choices(list(KINDS), [often for often, _ in KINDS.values()])[0]
        refusal = None
        if "refused" in kind:
            place, passage = self.rng.choice(WRITES), self.rng.randint(1, 9)
            refusal = f"{place}:{self.rng.randrange(2)}:{passage}:{self.rng.choice(REFUSALS)}"
        complete = newest(self.run_dir)
        self.starts += 1
        with self.start(self.run_dir, refusal) as job:
            self._wait(job)
            if not all(process.is_alive() for process in job.processes):
                assert job.wait(PATIENCE) == [0, 0], f"nothing was done to it\n{job.output()}"
                done = True
            else:
                begun = time.monotonic()
                self._strike(kind, job)
                codes = job.wait(PATIENCE)
                self.ends.append(time.monotonic() - begun)
                done = codes == [0, 0]  # the fault came too late
                assert done or set(codes) <= KINDS[kind][1], f"{kind}: {codes}\n{job.output()}"
            check_went_on(job, complete, self.steps)
        self.computed += max(0, logged(self.run_dir) - complete)
        if not done:
            self.faults[kind] += 1
            if "damaged" in kind:
                self._damage()
        return done

    def _wait(self, job: Job) -> None:
        """Until the moment of the fault: some seconds after setup, so that the mean time between faults is as asked."""
        while "run folder" not in job.output(0) and all(process.is_alive() for process in job.processes):
            time.sleep(0.01)
        wait = self.rng.expovariate(1 / self.every)
        connection.wait([process.sentinel for process in job.processes], wait)

    def _strike(self, kind: str, job: Job) -> None:
        rank = self.rng.randrange(2)
        if kind == "TERM to one rank":
            job.send(signal.SIGTERM, rank)
        elif kind == "USR1 to both":
            job.send(signal.SIGUSR1)
        elif kind == "Ctrl-C":
            job.send(signal.SIGINT)
        elif kind == "a rank frozen":
            job.send(signal.SIGSTOP, rank)
            job.processes[1 - rank].join(PATIENCE)
            job.send(signal.SIGKILL, rank)
        elif kind in ("one rank killed", "a write refused, later killed"):
            job.send(signal.SIGKILL, rank)
        else:
            job.send(signal.SIGKILL)

    def _damage(self) -> None:
        """Flip a bit in, cut off or remove a file of the newest checkpoint, if there is another one."""
        root = self.run_dir / manifest.FOLDER
        folders = manifest.folders(root)
        if len(folders) < 2 or manifest.newest_intact(root)[0] != folders[0] or manifest.problem(folders[1]):
            return
        victim = self.rng.choice(sorted(path for path in folders[0].iterdir() if path.suffix == ".pt"))
        how = self.rng.randrange(3)
        if how == 0:
            flip_a_bit(victim)
        elif how == 1:
            victim.write_bytes(victim.read_bytes()[: self.rng.randrange(victim.stat().st_size)])
        else:
            victim.unlink()

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in sorted(self.faults.items()))
        ends = sorted(self.ends) or [0.0]
        reached = logged(self.run_dir)
        return (
            f"{self.faults.total()} faults ({kinds}) in {self.starts} starts to step {reached}; "
            f"{reached / max(1, self.computed):.1%} of the computed steps counted; from a fault to the end of both "
            f"ranks: median {ends[len(ends) // 2]:.2f} s, most {ends[-1]:.1f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=18000)
    parser.add_argument("--every", type=float, default=4.0, help="mean seconds of training between faults")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megagpt-soak-") as folder:
        soak = Soak(Path(folder), args.steps, args.every, args.seed)
        soak.run()
        print(f"{soak}; the curve and the last checkpoint are the undisturbed run's; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
