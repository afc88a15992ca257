"""What a loss of power can leave of a run's folder: every operation on files is recorded, and the crash is replayed.

    python tests/power_loss.py [--variants 200] [--seed 0]

A disk keeps for certain what was forced to it: a file's bytes after an fsync of the file, names after one of their
folder. Of the rest anything may be there. A recording is cut after every operation; any of the pending changes of names
is kept or lost, each by itself, and bytes that were not forced are missing, zeros, cut off or there.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint_common import finished_run, flip_a_bit, folder
from crash_disk import Disk, File
from disk_recorder import Recording, record

from megagpt.train import manifest, metrics, retention

MIRROR = "second_place"  # beside the run's folder
LOST, ZEROS, CUT, WHOLE = range(4)  # what may become of bytes that were not forced to disk


@dataclass
class Survey:
    """Every crash of a recording that is looked at, once each."""

    recording: Recording
    rng: random.Random
    scratch: Path
    variants: int
    seen: set[int] = field(default_factory=set)
    committed: Counter = field(default_factory=Counter)  # the newest step by folder of checkpoints

    def run(self) -> int:
        """How many different states were looked at. Fails where one of them has lost a checkpoint."""
        disk = Disk(self.recording)
        for event in self.recording.events:
            disk.do(event)
        self._forced = disk.forced  # the nodes of the second pass have the same numbers
        disk = Disk(self.recording)
        renamed: dict[tuple, str] = {}
        for event in self.recording.events:
            who = event["pid"], event["thread"]
            disk.do(event)
            if event["op"] == "rename" and manifest.step_of(Path(event["to"])) is not None:
                renamed[who] = event["to"]
            if event["op"] == "mark" and event["place"] == "committed":
                root, _, name = renamed[who].rpartition("/")
                self.committed[root] = manifest.step_of(Path(name))
            for keep, fates in self._variants(len(disk.pending)):
                self._look(disk.crash(keep, lambda node, file, f=fates, at=event["at"]: self._bytes(node, file, f, at)))
        return len(self.seen)

    def _variants(self, n: int):
        """Which pending changes are kept, and what becomes of open files (None: each has a fate of its own)."""
        for fate in (LOST, ZEROS, CUT, WHOLE):
            yield [True] * n, fate
            yield [False] * n, fate
        for _ in range(self.variants):
            kept = self.rng.randint(0, n)
            in_order = self.rng.random() < 0.5  # as a journal keeps them
            yield [i < kept if in_order else self.rng.random() < 0.5 for i in range(n)], None

    def _bytes(self, node: int, file: File, fate: int | None, now: int) -> bytes:
        coming = next((data for at, data in self._forced.get(node, []) if at > now), b"")
        if not coming.startswith(file.forced):
            return file.forced
        fate = self.rng.randrange(4) if fate is None else fate
        more = coming[len(file.forced) :]
        cut = self.rng.randint(0, len(more))
        return file.forced + {LOST: b"", ZEROS: bytes(len(more)), CUT: more[:cut], WHOLE: more}[fate]

    def _look(self, state: dict[str, bytes]) -> None:
        wanted = {p: data for p, data in state.items() if f"{manifest.FOLDER}/" in p or p.endswith(metrics.NAME)}
        key = hash((frozenset(wanted.items()), *self.committed.items()))  # the same may be left when more is promised
        if key in self.seen:
            return
        self.seen.add(key)
        with tempfile.TemporaryDirectory(dir=self.scratch) as place:
            for path, data in wanted.items():
                if path.endswith("/"):
                    Path(place, path).mkdir(parents=True, exist_ok=True)
                else:
                    Path(place, path).parent.mkdir(parents=True, exist_ok=True)
                    Path(place, path).write_bytes(data)
            for root, committed in self.committed.items():
                step = _newest(Path(place, root))
                assert step >= committed, f"{root} has lost step {committed} and has {step}: {sorted(wanted)}"
                log = Path(place, root).parent / metrics.NAME
                if MIRROR not in root:
                    steps = {record["step"] for record in metrics.read(log)}
                    assert steps >= set(range(1, step + 1)), f"the checkpoint is of step {step} and the log has {steps}"


def _newest(root: Path) -> int:
    """The step that a run would go on from, as it looks for it; 0 from the beginning."""
    retention.remove_leftovers(root)
    found, _ = manifest.newest_intact(root)
    return manifest.step_of(found) if found else 0


def survey_fresh_run(base: Path, variants: int, seed: int = 0) -> int:
    """A run from the beginning, whose checkpoints are copied to a second place as well: how many states."""
    recording = record(base, max_steps=3, keep_last=2, mirror=base / MIRROR)
    return survey(recording, base, variants, seed, {"run": 0, MIRROR: 0}, 3)


def survey_resumed_run(base: Path, variants: int, seed: int = 0) -> int:
    """``base``/run of four steps, of which the last one is damaged, goes on and saves in the background."""
    flip_a_bit(folder(base / "run", 4) / manifest.STATE)
    recording = record(base, "--async_save", max_steps=6, keep_last=2)
    return survey(recording, base, variants, seed, {"run": 3}, 6)


def survey(recording: Recording, base: Path, variants: int, seed: int, begun: dict[str, int], last: int) -> int:
    with tempfile.TemporaryDirectory(dir=base) as scratch:
        survey = Survey(recording, random.Random(seed), Path(scratch), variants)
        survey.committed.update({f"{name}/{manifest.FOLDER}": step for name, step in begun.items()})
        states = survey.run()
    assert set(survey.committed.values()) == {last}, "the recording has every save"
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megagpt-power-") as base:
        states = survey_fresh_run(Path(base, "fresh"), args.variants, args.seed)
        finished_run(Path(base, "resumed", "run"))
        states += survey_resumed_run(Path(base, "resumed"), args.variants, args.seed)
    seconds = time.monotonic() - begun
    print(f"{states} states after a loss of power, in each the newest complete checkpoint; {seconds:.0f} s")


if __name__ == "__main__":
    main()
