"""Tensors that are read one at a time, so that a model passes through less memory than it takes; no torch on import."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensors:
    """Named tensors. ``read`` gives one of them in float32 on the CPU; it may lie in a mapped file, so it is only read.

    A file that they lie in stays open as long as this object is kept.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], "Tensor"]

    @classmethod
    def of(cls, weights: Mapping[str, "Tensor"]) -> "Tensors":
        """Those of a state dict."""
        return cls({name: tuple(x.shape) for name, x in weights.items()}, lambda name: weights[name].detach().float())

    @property
    def n_bytes(self) -> int:
        """What all of them take in float32."""
        return sum(map(float32_bytes, self.shapes.values()))

    def all(self) -> dict[str, "Tensor"]:
        """A state dict of all of them."""
        return {name: self.read(name) for name in self.shapes}


def float32_bytes(shape: Iterable[int]) -> int:
    """What a tensor of ``shape`` takes."""
    return 4 * math.prod(shape)


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
    """Write ``names`` of ``tensors`` in float32, one after the other, and force the file to disk. Raises OSError.

    The format: 8 bytes with the length of a JSON header, the header, and behind it the tensors (safetensors' README).
    """
    names, header, end = list(names), {"__metadata__": metadata}, 0
    for name in names:
        start, end = end, end + float32_bytes(tensors.shapes[name])
        header[name] = {"dtype": "F32", "shape": list(tensors.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            x = tensors.read(name).contiguous()
            assert tuple(x.shape) == tensors.shapes[name], name
            file.write(x.numpy().astype("<f4", copy=False).data)
        file.flush()
        os.fsync(file.fileno())
