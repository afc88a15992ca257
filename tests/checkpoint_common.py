"""A small finished run, and what tests do to its folder."""

import itertools
import json
import os
import shutil
import tempfile
import zlib
from pathlib import Path

from corpora import tiny_corpus
from distributed import train

from megagpt.train import manifest

# Every way in which weights and optimiser states can be kept.
CONFIGS = {f"zero{stage}_{p}": (stage, p) for stage, p in itertools.product(range(4), ("fp32", "bf16", "fp16"))}


def arguments(run_dir, *more, stage=1, fp16=None, **changes) -> list:
    """Flags of a run of 4 steps that saves at each; ``changes`` replace flags by name.

    ``fp16`` is about the loss scale, as in DeepSpeed's file.
    """
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "tensorboard": {}}
    text = json.dumps(settings | ({"fp16": fp16} if fp16 else {}))
    config = Path(tempfile.gettempdir(), f"megagpt-test-{zlib.crc32(text.encode()):08x}-{os.getpid()}.json")
    config.write_text(text)
    flags = {
        "ds_config": config,
        "model": "tiny",
        "n_layer": 1,
        "d_model": 32,
        "n_head": 2,
        "seq_len": 16,
        "data": tiny_corpus(),
        "run_dir": run_dir,
        "max_steps": 4,
        "save_interval": 1,
        "keep_last": 9,
        "lr": 1e-3,
        "warmup_steps": 1,
        "log_interval": 1,
        **changes,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", value)] + list(more)


def finished_run(run_dir: Path) -> Path:
    """``run_dir`` after a run of two ranks."""
    codes, output = train(arguments(run_dir), 2)
    assert codes == [0, 0], output
    return run_dir


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"global_step{step}"


def shard(run_dir: Path, step: int, rank: int = 1) -> Path:
    return folder(run_dir, step) / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def stopped_after(whole: Path, run_dir: Path, step: int) -> Path:
    """Make ``run_dir`` what the finished run ``whole`` would have been had it ended after the save of ``step``."""

    def later(_, names: list[str]) -> list[str]:
        return [name for name in names if (manifest.step_of(Path(name)) or 0) > step]

    return shutil.copytree(whole, run_dir, ignore=later)


def resume(run_dir: Path, *more, ranks=2, env=None, **changes) -> tuple[int, str]:
    codes, output = train(arguments(run_dir, *more, **{"max_steps": 6, **changes}), ranks, env=env)
    assert len(set(codes)) == 1, output
    return codes[0], output


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def curve(run_dir: Path) -> list[dict]:
    """What was computed at each step, without what was measured about the computing."""
    keep = ("step", "loss", "lr", "grad_norm", "loss_scale", "tokens", "samples", "skipped_steps")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k in keep or k.startswith("valid/")} for r in records]


def tensors(folder: Path) -> dict:
    """Every tensor of every shard of a checkpoint, by file and place."""
    import torch

    from megagpt.train.safe import allow_checkpoint_classes

    allow_checkpoint_classes()
    found = {}
    for path in sorted(folder.glob("*.pt")):
        found |= tensors_in(torch.load(path, weights_only=True), path.name)
    return found


def tensors_in(value, place: str = "") -> dict:
    """Every tensor in nested dictionaries and lists, by its place."""
    import torch

    if torch.is_tensor(value):
        return {place: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: tensor for key, part in parts for name, tensor in tensors_in(part, f"{place}/{key}").items()}
