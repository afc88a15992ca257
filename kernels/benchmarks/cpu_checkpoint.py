"""How fast a checkpoint is saved and a run is back: megagpt's durable, hashed save beside plain torch.save.

    python kernels/benchmarks/cpu_checkpoint.py [--layers 12] [--rounds 7] [--output FOLDER]

A save of weights and Adam's moments in four forms: torch.save as it is (bytes in the page cache, no hash), the same
followed by fsync, the same followed by fsync and SHA-256, and ours, which promises what the last one does and a rename
besides. Beside them what the disk allows: the same bytes, ready in memory, written and forced to disk. Then how long a
run waits for a save, at once and in the background, and the seconds from starting train.py to the first step of a
resumed run. The disk is that of the folder for temporary files; TMPDIR names another.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import count
from pathlib import Path
from shutil import rmtree

import numpy as np
import timed_train
import timing
import torch
from training import write_corpus

from megagpt import dist
from megagpt.config import deepspeed as ds
from megagpt.config.fields import TrainSettings
from megagpt.data import storage
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT, decays
from megagpt.ops import load_ops
from megagpt.train import checkpoint, engine, manifest, optim
from megagpt.train.safe import allow_checkpoint_classes

REPO = Path(__file__).parents[2]
WIDTH, VOCAB, SEQ_LEN = 512, 8192, 64
OURS, PEERS = "megagpt", ("torch.save", "torch.save, fsync", "torch.save, fsync, sha256")
DISK = "bytes alone, fsync"


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--layers", type=int, default=12, help="blocks of width 512; 12 give a checkpoint of 0.67 GB")
    args = parser.parse_args()
    layers, rounds = (1, 1) if args.quick else (args.layers, args.rounds or 7)
    report = timing.Report("cpu_checkpoint", timing.machine("torch", "deepspeed"), args.output)
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as folder:
        report.add("save", *bench_save(Path(folder), layers, rounds))
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as folder:
        report.add("stall", *bench_stall(Path(folder), layers, saves=rounds))
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as folder:
        report.add("restart", *bench_restart(Path(folder), layers, rounds=1 if args.quick else 3))


# -- saving


def bench_save(folder: Path, layers: int, rounds: int) -> tuple[dict, str]:
    """GB/s of each form of saving, and how many times as fast as each ours is."""
    built, config = make_engine(folder, layers)
    allow_checkpoint_classes()
    saved = save_ours(built, config, folder)
    gigabytes = sum(entry["size"] for entry in manifest.read(saved)["files"].values()) / 1e9
    files = sorted(saved.glob("*_states.pt"))
    states = [torch.load(path, weights_only=True) for path in files]
    works = {name: partial(save_plainly, states, sync="fsync" in name, hashed="sha256" in name) for name in PEERS}
    works[DISK] = partial(write_bytes, [path.read_bytes() for path in files])
    works[OURS] = partial(save_ours, built, config)
    numbers = count()

    def seconds(work) -> float:
        target = folder / str(next(numbers))
        target.mkdir()
        os.sync()
        found = timing.timed(partial(work, target))
        rmtree(target)
        return found

    results = timing.interleave({name: partial(seconds, work) for name, work in works.items()}, rounds)
    stop()
    rates = {name: timing.spread(gigabytes / s for s in values) for name, values in results.items()}
    ratios = {name: timing.paired(values, results[OURS]) for name, values in results.items()}
    rows = [[name, rates[name], ratios[name]] for name in works]
    table = timing.table(["form", "GB/s", "megagpt's rate to it"], rows)
    title = f"## Saving {gigabytes:.2f} GB: {layers} layers x {WIDTH}, fp32, ZeRO-1, one rank"
    return {"gigabytes": gigabytes, "gb_per_s": rates, "ratio": ratios}, f"{title}\n\n{table}"


def make_engine(folder: Path, layers: int):
    """An engine whose optimiser has taken a step, so that the moments are there to be saved, and its configuration."""
    settings = TrainSettings(ds_config="bench", data=("none",), run_dir=str(folder), micro_batch_size=1)
    raw = {"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": False}}
    world = dist.resolve_world({})
    dist.export(world)
    config = ds.resolve(raw, settings, 1, path="bench", hidden_size=WIDTH)
    engine.start_distributed(10)
    shape = GPTConfig(vocab_size=VOCAB, seq_len=SEQ_LEN, n_layer=layers, n_head=8, d_model=WIDTH)
    model = GPT(shape, load_ops("torch", head_width=64, dtype=torch.float32, device="cpu"))
    groups = optim.parameter_groups(model.named_parameters(), decays, lr=1e-3, weight_decay=0.01)
    optimizer, _ = optim.build_optimizer("adamw", groups, betas=(0.9, 0.999), eps=1e-8)
    built = engine.build_engine(model, optimizer, config)
    ids = torch.randint(VOCAB, (1, SEQ_LEN + 1))
    loss = built(ids[:, :-1], ids[:, 1:])
    built.backward(loss)
    built.step()
    return built, config


def stop() -> None:
    """Leave the process group, also as far as processes started from here can see."""
    engine.stop_distributed()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def save_ours(built, config, folder: Path) -> Path:
    return checkpoint.save(built, folder, checkpoint.TrainState(step=1), config, needed=0)


def save_plainly(states: list, folder: Path, *, sync: bool, hashed: bool) -> None:
    for i, state in enumerate(states):
        path = folder / f"{i}.pt"
        torch.save(state, path)
        if sync:
            storage.sync_path(path)
        if hashed:
            digest = hashlib.sha256()
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)


def write_bytes(contents: list[bytes], folder: Path) -> None:
    for i, content in enumerate(contents):
        path = folder / f"{i}.pt"
        path.write_bytes(content)
        storage.sync_path(path)


# -- in a run


def bench_stall(folder: Path, layers: int, saves: int) -> tuple[dict, str]:
    """Seconds of a step with and without a save, and of the steps from one save to the next, for each way of saving."""
    every = 6  # steps, so that a save in the background is done before the next one
    write_run(folder)
    kinds = {"at once": [], "in the background": ["--async_save"]}
    steps = {
        kind: train(folder, kind, layers, *more, max_steps=every * (saves + 1) + 1, save_interval=every)["steps"]
        for kind, more in kinds.items()
    }
    # The first steps are warm-up; the last save of a run is always waited for.
    kept = {kind: values[every:-1] for kind, values in steps.items()}
    plain = statistics.median(s for i, s in enumerate(kept["at once"]) if (i + 1) % every)
    figures, rows = {"step without a save": plain}, []
    for kind, values in kept.items():
        saving, cycle = values[every - 1 :: every], [sum(values[i : i + every]) for i in range(0, len(values), every)]
        figures[kind] = {"saving step": timing.spread(saving), "cycle": timing.spread(cycle)}
        waits = statistics.median(saving) - plain, statistics.median(cycle) - every * plain
        rows.append([kind, figures[kind]["saving step"], f"{waits[0]:.2f}", f"{waits[1]:.2f}"])
    header = ["saved", "step with a save, s", "more than one without, s", f"more in {every} steps, s"]
    title = f"## What a save costs a run: {layers} layers x {WIDTH}, fp32, ZeRO-1, one rank, {saves} saves"
    return figures, f"{title}\n\nA step without a save takes {plain:.2f} s.\n\n{timing.table(header, rows)}"


def bench_restart(folder: Path, layers: int, rounds: int) -> tuple[dict, str]:
    """Seconds from the start of train.py to the end of a resumed run's first step, and of the parts."""
    write_run(folder)
    train(folder, "run", layers, max_steps=1)
    found = [train(folder, "run", layers, max_steps=step)["parts"] for step in range(2, 2 + rounds)]
    seconds = {part: timing.spread(parts[part] for parts in found) for part in found[0]}
    title = f"## Restart to the first step, {layers} layers x {WIDTH}"
    rows = [[part, value] for part, value in seconds.items() if part != "in all"]
    return {"seconds": seconds}, f"{title}\n\n{seconds['in all']} s (goal 15)\n\n{timing.table(['part', 's'], rows)}"


def write_run(folder: Path) -> None:
    write_corpus(folder / "corpus", np.random.default_rng(0).integers(0, VOCAB, 1_000_000), VOCAB)
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": False}}))


def train(folder: Path, run: str, layers: int, *more: str, **changes) -> dict:
    """Run train.py; what timed_train.py found."""
    flags = {"ds_config": folder / "ds.json", "data": folder / "corpus", "run_dir": folder / run, "keep_last": 1}
    flags |= {"n_layer": layers, "d_model": WIDTH, "n_head": 8, "seq_len": SEQ_LEN}
    flags |= {"micro_batch_size": 1, "log_interval": 1, **changes}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(Path(__file__).with_name("timed_train.py")), "--model", "tiny", *words, *more]
    env = {**os.environ, timed_train.BEGUN: str(time.time())}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"train.py ended with {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
