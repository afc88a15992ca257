"""How fast a checkpoint is saved and a run is back: megagpt's durable, hashed save beside plain torch.save.

    python kernels/benchmarks/cpu_checkpoint.py [--layers 8] [--rounds 5]

Prints GB/s of a save of weights and Adam's moments, medians over interleaved rounds: ``torch.save`` as it is (bytes in
the page cache, no hash), the same followed by fsync, the same followed by fsync and sha256, and ours (written, hashed,
forced to disk and renamed). Then the seconds from starting ``train.py`` to the first step of a resumed run.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megagpt import dist
from megagpt.config import deepspeed as ds
from megagpt.config.fields import TrainSettings
from megagpt.data.writer import CorpusWriter, Counts
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT, decays
from megagpt.ops import load_ops
from megagpt.train import checkpoint, engine, manifest, optim

REPO = Path(__file__).parents[2]
WIDTH = 512
KINDS = ("torch.save", "torch.save+fsync", "torch.save+fsync+sha256", "ours")


def make_engine(folder: Path, layers: int):
    """An engine whose optimiser has taken a step, so that the moments are there to be saved."""
    settings = TrainSettings(ds_config="bench", data=("none",), run_dir=str(folder), micro_batch_size=1)
    raw = {"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": False}}
    world = dist.resolve_world({})
    dist.export(world)
    config = ds.resolve(raw, settings, 1, path="bench", hidden_size=WIDTH)
    engine.start_distributed(world, 10)
    shape = GPTConfig(vocab_size=8192, seq_len=64, n_layer=layers, n_head=8, d_model=WIDTH)
    model = GPT(shape, load_ops("torch", head_width=64, dtype=torch.float32, device="cpu"))
    groups = optim.parameter_groups(model.named_parameters(), decays, lr=1e-3, weight_decay=0.01)
    optimizer, _ = optim.build_optimizer("adamw", groups, betas=(0.9, 0.999), eps=1e-8)
    built = engine.build_engine(model, optimizer, config)
    ids = torch.randint(8192, (1, 65))
    loss = built(ids[:, :-1], ids[:, 1:])
    built.backward(loss)
    built.step()
    return built, config


def plain_save(states: list, folder: Path, *, sync: bool, hashed: bool) -> None:
    for i, state in enumerate(states):
        path = folder / f"{i}.pt"
        torch.save(state, path)
        if sync:
            manifest.fsync(path)
        if hashed:
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256") if sys.version_info >= (3, 11) else hashlib.sha256(file.read())


def measure_saves(layers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each save in each round, and under ``bytes`` the bytes of one."""
    seconds: dict[str, list[float]] = {
        "torch.save": [],
        "torch.save+fsync": [],
        "torch.save+fsync+sha256": [],
        "ours": [],
    }
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-", dir=os.environ.get("MEGAGPT_BENCH_DIR")) as name:
        folder = Path(name)
        built, config = make_engine(folder, layers)
        checkpoint.allow_checkpoint_classes()
        saved = checkpoint.save(built, folder, checkpoint.TrainState(step=1), config, needed=0)
        size = sum(entry["size"] for entry in manifest.read(saved)["files"].values())
        states = [
            torch.load(path, weights_only=True)
            for path in sorted(saved.glob("mp_*.pt")) + sorted(saved.glob("zero*.pt"))
        ]
        for round_ in range(rounds):
            for kind in seconds:
                target = folder / f"{kind}{round_}"
                target.mkdir()
                os.sync()
                begun = time.perf_counter()
                if kind == "ours":
                    checkpoint.save(built, target, checkpoint.TrainState(step=2), config, needed=0)
                else:
                    plain_save(states, target, sync="fsync" in kind, hashed="sha256" in kind)
                seconds[kind].append(time.perf_counter() - begun)
                shutil.rmtree(target)
    engine.stop_distributed()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # what follows is another job
    return {"bytes": [size], **seconds}


def write_corpus(prefix: Path) -> None:
    """A million random tokens."""
    work = Path(f"{prefix}.work")
    work.mkdir()
    writer = CorpusWriter(work, "part", 8192)
    ids = np.random.default_rng(0).integers(0, 8192, 1_000_000)
    writer.append(ids, np.array([len(ids)]), 0, Counts(1, len(ids), len(ids), len(ids), int(ids.max())))
    writer.finish(str(prefix), b"{}", "0" * 64, None, {})
    writer.close()


def measure_restart(layers: int) -> float:
    """Seconds from the start of the process to the first step's log line of a resumed run."""
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        shape = ["--model", "tiny", "--n_layer", layers, "--d_model", WIDTH, "--n_head", 8, "--seq_len", 64]
        command = [sys.executable, "train.py", "--ds_config", folder / "ds.json", *shape, "--data", folder / "corpus"]
        command += ["--run_dir", folder / "run", "--micro_batch_size", 1, "--log_interval", 1, "--max_steps"]
        subprocess.run([*map(str, command), "1"], cwd=REPO, check=True, capture_output=True)
        begun = time.perf_counter()
        process = subprocess.Popen([*map(str, command), "2"], cwd=REPO, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if " iteration " in line and "lm loss" in line:
                elapsed = time.perf_counter() - begun
        process.wait()
        return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12, help="blocks of width 512; 12 give a checkpoint of 0.67 GB")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    seconds = measure_saves(args.layers, args.rounds)
    size = seconds.pop("bytes")[0]
    print(f"checkpoint of {size / 1e9:.2f} GB, ZeRO-1, one rank, medians of {args.rounds} interleaved rounds")
    for kind, values in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(values, seconds["ours"], strict=True)]
        print(
            f"{kind:<26}{statistics.median(values):7.2f} s {size / statistics.median(values) / 1e9:6.2f} GB/s   "
            f"ours is {statistics.median(ratios):.2f}x its rate ({min(ratios):.2f}-{max(ratios):.2f})"
        )
    print(f"restart to the first step: {measure_restart(args.layers):.1f} s")


if __name__ == "__main__":
    main()
