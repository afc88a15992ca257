"""Weights as Hugging Face keeps them: one file, or shards of limited size with an index."""

import json
import re
from pathlib import Path

from megagpt.errors import ConfigError
from megagpt.model.hf_folder import INDEX, WEIGHTS
from megagpt.model.tensors import Tensors, write_safetensors

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?i?B)", re.IGNORECASE)
_UNITS = {"B": 0, "KB": 1, "MB": 2, "GB": 3, "TB": 4}
_METADATA = {"format": "pt"}  # what transformers looks for


def parse_size(text: str) -> int:
    """Bytes of 5GB (10^9 each) or 5GiB (2^30). Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "B")
    size = int(number * (1024 if "I" in unit else 1000) ** _UNITS.get(unit.replace("I", ""), 0))
    if size < 1:
        raise ConfigError(f"--max_shard_size {text!r} is no size; give one such as 5GB, 500MB or 2GiB")
    return size


def plan_shards(tensors: Tensors, most: int) -> list[list[str]]:
    """The names in each shard, in their order. A tensor is never divided: one larger than ``most`` bytes is alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors.shapes:
        n_bytes = tensors.bytes_of(name)
        if shards[-1] and size + n_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += n_bytes
    return shards


def write_shards(folder: Path, tensors: Tensors, most: int) -> int:
    """Write all of ``tensors``, one at a time; the number of files. Raises OSError."""
    shards = plan_shards(tensors, most)
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, tensors, shards[0], _METADATA)
        return 1
    places = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, tensors, names, _METADATA)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": tensors.n_bytes}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(shards)
