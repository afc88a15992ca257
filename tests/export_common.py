"""Small saved models whose every tensor counts, and a look at folders."""

import json
from pathlib import Path

import torch
from data_common import PARAGRAPHS
from safetensors.torch import save_file

from megagpt.data.bpe import parse_training, train
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

SHAPE = {"seq_len": 48, "n_layer": 2, "n_head": 2, "d_model": 32}
STYLES = {"pre": "bytelevel", "post": "wordend"}  # of tokenizers, as GPT-2 and GPT-1 have them


def tokenizer_of(norm: str):
    return train(PARAGRAPHS * 20, parse_training(f"train:300:{STYLES[norm]}"))


def randomised(state: dict, std: float = 0.2) -> dict:
    """Every tensor drawn anew: matrices with ``std``, tables wider so that tokens count, gains around one."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, x in state.items():
        noise = torch.randn(x.shape, generator=generator)
        gain = "ln_" in name and name.endswith("weight")
        spread = 3 * std if "wte" in name or "wpe" in name else std
        found[name] = spread * noise if x.dim() == 2 else 0.1 * noise + (1.0 if gain else 0.0)
    return found


def ops():
    return load_ops("torch", head_width=16, dtype=torch.float32, device="cpu")


def saved(folder: Path, norm: str, std: float = 0.2, **changes) -> Path:
    """The path of a model.safetensors with a tokenizer.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of(norm)
    tokenizer.save(folder / "tokenizer.json")
    config = GPTConfig(**{"vocab_size": tokenizer.vocab_size, "norm": norm, **SHAPE, **changes})
    with torch.device("meta"):
        state = GPT(config, ops()).state_dict()
    about = {"config": json.dumps(config.to_dict()), "tokenizer_sha256": tokenizer.sha256}
    save_file(randomised(state, std), folder / "model.safetensors", metadata=about)
    return folder / "model.safetensors"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
