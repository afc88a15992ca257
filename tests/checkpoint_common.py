"""A small finished run, and what tests do to its folder."""

import json
import os
import tempfile
from pathlib import Path

from corpora import tiny_corpus
from distributed import train


def arguments(run_dir, *more, stage=1, **changes) -> list:
    """Flags of a run of 4 steps that saves at each; ``changes`` replace flags by name."""
    config = Path(tempfile.gettempdir(), f"megagpt-test-zero{stage}-{os.getpid()}.json")
    config.write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "tensorboard": {}})
    )
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


def resume(run_dir: Path, *more, ranks=2, env=None, **changes) -> tuple[int, str]:
    codes, output = train(arguments(run_dir, *more, **{"max_steps": 6, **changes}), ranks, env=env)
    assert len(set(codes)) == 1, output
    return codes[0], output


def several_runs(cases):
    """Runs of ``train.py`` that share a process group; in each the loss of some samples is multiplied by a factor.

    ``cases`` is {name: (argv, samples, factor)}. Each micro-batch and how the run ends is printed.
    """
    import os

    from test_train_fp16 import let_fp16_through

    from megagpt import dist
    from megagpt.config import deepspeed
    from megagpt.config.fields import parse
    from megagpt.errors import MegaGPTError
    from megagpt.train import engine, run
    from megagpt.train.batches import MicroBatches, without
    from megagpt.train.folder import locked
    from megagpt.train.plan import make_plan

    fetch = MicroBatches._fetch

    def noting(self, indices):
        batch = fetch(self, indices)
        batch.samples = without(self._left_out, indices).tolist()
        return batch

    MicroBatches._fetch = noting
    let_fp16_through()
    world = dist.resolve_world(os.environ)
    dist.export(world)
    device = engine.device_of(world)
    engine.start_distributed(5)
    for name, (argv, samples, factor) in cases.items():
        settings = parse(argv)
        plan = make_plan(settings, deepspeed.load(settings.ds_config), world)
        try:
            with locked(plan.run_dir), run.opened(plan, world, device) as loop:
                forward = loop.forward

                def spoilt(model, batch, forward=forward, loop=loop, name=name, samples=samples, factor=factor):
                    print(f"{name} step {loop.state.step + 1} samples {batch.samples}")
                    return forward(model, batch) * (factor if set(batch.samples) & set(samples) else 1.0)

                loop.forward = spoilt
                loop.run()
                print(f"{name} is done")
        except MegaGPTError as error:
            print(f"{name} ends with {error.exit_code}: {error}")


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

    found = {}

    def walk(prefix, value):
        if torch.is_tensor(value):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                walk(f"{prefix}/{key}", part)
        elif isinstance(value, list | tuple):
            for i, part in enumerate(value):
                walk(f"{prefix}/{i}", part)

    allow_checkpoint_classes()
    for path in sorted(folder.glob("*.pt")):
        walk(path.name, torch.load(path, weights_only=True))
    return found
