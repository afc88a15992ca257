"""A folder in Hugging Face's form: config.json and safetensors, in one file or in shards with an index."""

import json
from pathlib import Path

from megagpt.errors import CheckpointError
from megagpt.model.config import GPTConfig
from megagpt.model.hf_config import from_hf_config
from megagpt.model.interop import as_ours
from megagpt.model.tensors import Tensors, read_safetensors, refuse_pickles

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MOST_BYTES = 1 << 26  # of a JSON file


def is_hf_folder(path: Path) -> bool:
    """Whether ``path`` is a folder with a model in Hugging Face's form."""
    return (path / CONFIG).is_file()


def read_hf_folder(path: Path) -> tuple[GPTConfig, Tensors]:
    """The shape and the weights of a ``gpt2`` or ``openai-gpt`` folder, under the names of ``GPT``.

    Raises CheckpointError for a model of another kind, for tensors that are missing, too many or misshapen, and where
    the weights are pickles.
    """
    config = from_hf_config(read_json(path / CONFIG), str(path / CONFIG))
    tensors = _tensors(path)
    try:
        if config.n_layer > len(tensors.shapes):
            raise CheckpointError(f"{config.n_layer:,} blocks need more than the {len(tensors.shapes)} tensors there")
        return config, as_ours(tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path} does not hold the model that its {CONFIG} describes: {error}") from None


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError for anything else."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def _tensors(path: Path) -> Tensors:
    if (path / WEIGHTS).is_file():
        return read_safetensors(path / WEIGHTS)
    refuse_pickles(path)
    if not (path / INDEX).is_file():
        raise CheckpointError(f"{path} has neither {WEIGHTS} nor {INDEX}")
    places = read_json(path / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    files = sorted({str(name) for name in places.values()})
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX} names {name[:80]!r}, which is no .safetensors file beside it")
    tensors = read_safetensors(*(path / name for name in files))
    lacking = sorted(places.keys() - tensors.shapes.keys())
    if lacking:
        raise CheckpointError(f"{path / INDEX} names {lacking[0]}, which is not in {places[lacking[0]]}")
    return tensors
