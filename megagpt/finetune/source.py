"""The pre-trained weights that a run starts from: what is known of them before they are read."""

from pathlib import Path

import torch

from megagpt.errors import CheckpointError, ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops
from megagpt.train import manifest


def read_source(init_from: str, *, weights_taken: bool) -> tuple[GPTConfig, str | None]:
    """The shape of the decoder in ``init_from`` and its tokenizer's SHA-256 where that is known.

    Only small files and the headers of large ones are read. Raises CheckpointError where there are no weights, where
    they are fine-tuned already, and with ``weights_taken`` where a file lacks some.
    """
    path = manifest.weights_path(Path(init_from))
    source = manifest.read_decoder_source(path)
    try:
        model = GPTConfig.from_dict(source.model)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not say which model its weights are of: {error}") from None
    if weights_taken and path.suffix == ".safetensors":
        _check_shapes(path, model)
    return model, source.tokenizer_sha256


def identity(init_from: str) -> dict:
    """Which weights they are: step and manifest of the checkpoint, or name and size of the file."""
    path = manifest.weights_path(Path(init_from))
    if path.suffix == ".safetensors":
        return {"file": path.name, "size": path.stat().st_size}
    folder, _ = manifest.locate(path, problem=lambda _: None)
    return {"step": manifest.step_of(folder), "manifest": manifest.hash_file(folder, manifest.MANIFEST).sha256}


def _check_shapes(path: Path, model: GPTConfig) -> None:
    with manifest.open_safetensors(path, framework="np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 no mapping
    ops = load_ops("torch", head_width=model.head_width, dtype=torch.float32, device="cpu")
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in GPT(model, ops).state_dict().items()}
    for name, shape in wanted.items():
        if found.get(name) != shape:
            there = f"one of shape {found[name]}" if name in found else "none"
            raise CheckpointError(
                f"{path} does not hold the weights of the decoder it describes: {name} should have the shape {shape} "
                f"and there is {there}"
            )
