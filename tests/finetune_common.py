"""A small pre-trained model and small tasks for tests of fine-tuning, made once a session."""

import atexit
import functools
import json
import random
import tempfile
from pathlib import Path

import torch
from data_common import write_tokenizer
from safetensors.torch import save_file

from megagpt.data.tokenizer import from_file
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

SHAPE = {"seq_len": 32, "n_layer": 3, "n_head": 2, "d_model": 32}


@functools.cache
def folder() -> Path:
    temporary = tempfile.TemporaryDirectory(prefix="megagpt-finetune-")
    atexit.register(temporary.cleanup)
    return Path(temporary.name)


@functools.cache
def pretrained(norm: str = "post", **changes) -> Path:
    """A .safetensors file of untrained weights beside its tokenizer.json."""
    home = folder() / "-".join(["gpt", norm, *map(str, changes.values())])
    home.mkdir(exist_ok=True)
    write_tokenizer(home / "tokenizer.json")
    tokenizer = from_file(home / "tokenizer.json")
    config = GPTConfig(vocab_size=tokenizer.vocab_size, norm=norm, **{**SHAPE, **changes})
    torch.manual_seed(7)
    model = GPT(config, load_ops("torch", head_width=config.head_width, dtype=torch.float32, device="cpu"))
    about = {"config": json.dumps(config.to_dict()), "tokenizer_sha256": tokenizer.sha256}
    save_file(model.state_dict(), home / "gpt.safetensors", metadata=about)
    return home / "gpt.safetensors"


def ds_config(home: Path, stage: int = 0, precision: str = "fp32", **more) -> Path:
    path = home / f"zero{stage}_{precision}.json"
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": precision == "bf16"},
                "tensorboard": {"enabled": False},
                **more,
            }
        )
    )
    return path


def write_csv(path: Path, n: int, seed: int = 0) -> Path:
    """Two classes, told apart by one word."""
    rng = random.Random(seed)
    rows = ["text,label"]
    for i in range(n):
        filler = [rng.choice(("time", "people", "way", "day", "man", "thing")) for _ in range(rng.randint(1, 6))]
        filler.insert(rng.randrange(len(filler) + 1), ("good", "bad")[i % 2])
        rows.append(f"{' '.join(filler)},{('plus', 'minus')[i % 2]}")
    path.write_text("\n".join(rows) + "\n")
    return path


def train_all(cases: list[list]) -> None:
    """Runs of ``finetune.py`` on this rank that share a process group: they take less than starting one."""
    import os

    from megagpt.dist import resolve_world
    from megagpt.finetune import driver
    from megagpt.train.engine import device_of

    world = resolve_world(os.environ)
    for argv in cases:
        plan = plan_of(argv, world)
        device = device_of(world) if torch.distributed.is_initialized() else driver.start(plan, world)
        driver.finetune(plan, world, device)


def plan_of(argv: list, world=None):
    """The plan of a run of ``finetune.py``, on one rank unless told."""
    from megagpt.config import deepspeed
    from megagpt.dist import resolve_world
    from megagpt.finetune.fields import parse
    from megagpt.finetune.plan import make_plan

    settings = parse([str(word) for word in argv])
    return make_plan(settings, deepspeed.load(settings.ds_config), world or resolve_world({}))
