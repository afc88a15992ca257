"""Tensors that are read one at a time, so that a model passes through less memory than it takes; no torch on import."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What safetensors calls them, what torch does, and bytes a number.
DTYPES = {"fp32": ("F32", "float32", 4), "fp16": ("F16", "float16", 2), "bf16": ("BF16", "bfloat16", 2)}
_FLOATS = tuple(name for name, _, _ in DTYPES.values())
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Tensors:
    """Named tensors. ``read`` gives one of them in float32 on the CPU; it may lie in a mapped file, so it is only read.

    A file that they lie in stays open as long as this object is kept. ``dtype``, one of ``DTYPES``, is what they are
    written in; what ``read`` gives has been rounded to it.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], "Tensor"]
    dtype: str = "fp32"

    @classmethod
    def of(cls, weights: Mapping[str, "Tensor"]) -> "Tensors":
        """Those of a state dict."""
        return cls({name: tuple(x.shape) for name, x in weights.items()}, lambda name: weights[name].detach().float())

    def rounded(self, dtype: str) -> "Tensors":
        """They in another dtype. Reading raises CheckpointError for numbers beyond its range."""

        def read(name: str) -> "Tensor":
            x = self.read(name)
            there = x.to(torch_dtype(dtype)).float()
            if there.isinf().any() and not x.isinf().any():
                raise CheckpointError(f"{name} holds numbers up to {x.abs().max():.3g}, beyond the range of {dtype}")
            return there

        return self if dtype == self.dtype else replace(self, read=read, dtype=dtype)

    def bytes_of(self, name: str) -> int:
        """What one of them takes where it is written."""
        return DTYPES[self.dtype][2] * math.prod(self.shapes[name])

    @property
    def n_bytes(self) -> int:
        """What all of them take where they are written."""
        return sum(map(self.bytes_of, self.shapes))

    def all(self) -> dict[str, "Tensor"]:
        """A state dict of all of them."""
        return {name: self.read(name) for name in self.shapes}


def torch_dtype(dtype: str) -> "torch.dtype":
    """torch's dtype of a name in ``DTYPES``."""
    import torch

    return getattr(torch, DTYPES[dtype][1])


def refuse_pickles(path: Path) -> None:
    """Raise CheckpointError where ``path`` is a pickle, or a folder in which only pickles hold the weights."""
    names = [path.name] if path.is_file() else sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{path} holds weights as a pickle ({pickles[0]}), and reading one can run whatever code its maker put in; "
            "take a copy in safetensors, or make one with transformers, which loads tensors alone: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, weights_only=True).save_pretrained(NEW)"
        )


@contextlib.contextmanager
def open_safetensors(path: Path, *, framework: str):
    """The open file. Raises CheckpointError for one that is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from None


def read_safetensors(*paths: Path) -> Tensors:
    """The tensors of one or several files. Raises CheckpointError for what is damaged or no floating-point weights."""
    shapes, files = {}, {}
    for path in paths:
        with open_safetensors(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 no mapping
                part = file.get_slice(name)
                if part.get_dtype() not in _FLOATS:
                    raise CheckpointError(
                        f"{name} in {path} is of type {part.get_dtype()}; weights of type {', '.join(_FLOATS)} are read"
                    )
                if name in files:
                    raise CheckpointError(f"{name} is in {files[name].name} and in {path.name} of {path.parent}")
                shapes[name], files[name] = tuple(part.get_shape()), path

    def read(name: str) -> "Tensor":
        with open_safetensors(files[name], framework="pt") as file:
            return file.get_tensor(name).float()

    return Tensors(shapes, read)


def write_safetensors(path: Path, tensors: Tensors, names: Iterable[str], metadata: dict[str, str]) -> None:
    """Write ``names`` of ``tensors``, one after the other, and force the file to disk. Raises OSError.

    The format: 8 bytes with the length of a JSON header, the header, and behind it the tensors (safetensors' README).
    """
    import torch

    names, header, end = list(names), {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + tensors.bytes_of(name)
        kind = DTYPES[tensors.dtype][0]
        header[name] = {"dtype": kind, "shape": list(tensors.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = tensors.read(name).to(torch_dtype(tensors.dtype)).contiguous()
            assert tuple(x.shape) == tensors.shapes[name], name
            file.write(x.flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
