"""Damage done to checkpoints at random, and whether it is found and named.

    python tests/corruption.py [--count 20000] [--seed 0]

trains a small model on two ranks, then damages copies of its files. ``make corruption N=20000`` does it.
"""

import argparse
import collections
import json
import random
import tempfile
import time
from pathlib import Path

from checkpoint_common import finished_run

from megagpt.train import manifest

HOLE = 4096


def _bit(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _hole(path: Path, rng: random.Random, other: Path) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data)) // HOLE * HOLE
    data[at : at + HOLE] = bytes(len(data[at : at + HOLE]))
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _append(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, HOLE)))


def _remove(path: Path, rng: random.Random, other: Path) -> None:
    path.unlink()


def _swap(path: Path, rng: random.Random, other: Path) -> None:
    """The content of another file of this checkpoint: the shard of another rank."""
    neighbour = rng.choice([p for p in path.parent.iterdir() if p.is_file() and p != path])
    path.write_bytes(neighbour.read_bytes())


def _other_step(path: Path, rng: random.Random, other: Path) -> None:
    path.write_bytes((other / path.name).read_bytes())


def _link(path: Path, rng: random.Random, other: Path) -> None:
    """A link to a file outside with the right content."""
    content = path.read_bytes()
    path.unlink()
    outside = path.parent.parent / "outside"
    outside.write_bytes(content)
    path.symlink_to(outside)


def _edit(path: Path, rng: random.Random, other: Path) -> None:
    """A manifest that is valid JSON and says something else."""
    path = path.parent / manifest.MANIFEST
    content = json.loads(path.read_text())
    name = rng.choice(sorted(content["files"]))
    edits = (
        lambda: content.update(world_size=content["world_size"] + rng.randint(1, 9)),
        lambda: content.update(zero_stage=3 - content["zero_stage"]),
        lambda: content.update(step=rng.randint(5, 99)),
        lambda: content["files"].pop(name),
        lambda: content["files"][name].update(size=rng.randrange(10**6, 10**9)),
        lambda: content["files"][name].update(sha256=rng.randbytes(32).hex()),
        lambda: content["data"].update(seed=rng.randrange(9)),
        lambda: content.pop("sha256"),
        lambda: content.update(format=rng.choice([0, 3, "2", None])),
    )
    rng.choice(edits)()
    path.write_text(json.dumps(content, indent=1))


KINDS = {
    "bit": _bit,
    "hole": _hole,
    "truncated": _truncate,
    "appended": _append,
    "removed": _remove,
    "swapped": _swap,
    "other step": _other_step,
    "link": _link,
    "manifest edited": _edit,
}


def damage(folder: Path, other: Path, rng: random.Random) -> tuple[str, str]:
    """Change one file of ``folder``; the kind of damage and the file's name. ``other`` is an older checkpoint."""
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    while True:
        kind = rng.choice(list(KINDS))
        path = folder / manifest.MANIFEST if kind == "manifest edited" else rng.choice(sorted(before))
        KINDS[kind](path, rng, other)
        if not path.exists() or path.is_symlink() or path.read_bytes() != before[path]:
            return kind, path.name


def survey(run_dir: Path, count: int, seed: int = 0) -> collections.Counter:
    """Damage the newest checkpoint of ``run_dir`` ``count`` times, and put it right again; how often in which way.

    Fails where damage is not found, where the message names another file, or where not the next older one is taken.
    In every tenth case that one is damaged too, and the one before it has to be taken.
    """
    rng = random.Random(seed)
    newest, second, third, fourth = manifest.folders(run_dir / manifest.FOLDER)[:4]
    originals = {path: path.read_bytes() for f in (newest, second) for path in f.iterdir() if path.is_file()}
    kinds: collections.Counter = collections.Counter()
    for _ in range(count):
        kind, name = damage(newest, second, rng)
        damaged = [(newest, name)]
        if rng.random() < 0.1:
            damaged.append((second, damage(second, third, rng)[1]))
        found, skipped = manifest.newest_intact(run_dir / manifest.FOLDER)
        expected = third if len(damaged) == 2 else second
        assert found == expected, f"{kind} of {name}: {found} was taken in the place of {expected}"
        for (folder, file), line in zip(damaged, skipped, strict=True):
            assert line.startswith(f"skipped checkpoint {folder.name}: "), line
            # Without its entry in the manifest a file is foreign, with a wrong one it is damaged.
            assert file in line or (file == manifest.MANIFEST and "manifest" in line) or "format" in line, line
        kinds[kind] += 1
        for folder, _ in damaged:
            for path in [path for path in originals if path.parent == folder]:
                if path.is_symlink() or not path.exists() or path.read_bytes() != originals[path]:
                    path.unlink(missing_ok=True)
                    path.write_bytes(originals[path])
    assert manifest.problem(newest) is None
    assert manifest.problem(fourth) is None
    return kinds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megagpt-corruption-") as folder:
        run_dir = finished_run(Path(folder) / "run")
        begun = time.monotonic()
        kinds = survey(run_dir, args.count, args.seed)
        seconds = time.monotonic() - begun
    for kind, n in sorted(kinds.items()):
        print(f"{kind:16} {n:6}")
    print(f"{args.count} damaged checkpoints, all found and named, in {seconds:.1f} s")


if __name__ == "__main__":
    main()
