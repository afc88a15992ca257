"""The files in which OpenAI released GPT-1 (openai/finetune-transformer-lm, folder ``model``).

``params_0.npy``, ``params_1.npy``, ... laid one behind the other are one vector of float32; ``params_shapes.json``
lists the shapes of what lies in it: positions, tokens, and for each block attention, first LayerNorm, MLP and second
LayerNorm. Projections are (1, in, out), as in a convolution of width one.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch

from megagpt.errors import CheckpointError, ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.interop import as_ours
from megagpt.model.tensors import Tensors

SHAPES = "params_shapes.json"
_TABLES = ("positions_embed.weight", "tokens_embed.weight")
_BLOCK = [
    f"{part}.{kind}"
    for part in ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    for kind in ("weight", "bias")
]
_FILE = re.compile(r"params_(0|[1-9][0-9]{0,3})\.npy")


def is_openai_folder(path: Path) -> bool:
    return (path / SHAPES).is_file()


def read_openai_folder(path: Path, n_head: int) -> tuple[GPTConfig, Tensors]:
    """The shape and the weights under the names of ``GPT``; the number of heads is not in the files.

    Raises CheckpointError where the files are not what the shapes say.
    """
    shapes = _shapes(path / SHAPES)
    arrays = _arrays(path)
    needed, found = sum(map(math.prod, shapes)), sum(map(len, arrays))
    if needed != found:
        raise CheckpointError(f"{path}: {SHAPES} asks for {needed:,} numbers and params_*.npy hold {found:,}")
    n_layer = (len(shapes) - len(_TABLES)) // len(_BLOCK)
    names = [*_TABLES, *(f"h.{i}.{name}" for i in range(n_layer) for name in _BLOCK)]
    if n_layer < 1 or len(names) != len(shapes):
        raise CheckpointError(f"{path / SHAPES} lists {len(shapes)} tensors, and a GPT-1 has 2 and 12 a block")
    bare = [shape[1:] if len(shape) == 3 and shape[0] == 1 else shape for shape in shapes]
    if any(len(shape) != 2 for shape in (*bare[:2], bare[2 + _BLOCK.index("mlp.c_fc.weight")])):
        raise CheckpointError(f"{path / SHAPES} does not begin with two tables and a block's matrices")
    starts = dict(zip(names, np.cumsum([0, *map(math.prod, shapes)]).tolist(), strict=False))
    tensors = Tensors(
        dict(zip(names, bare, strict=True)),
        lambda name: _cut(arrays, starts[name], tensors.shapes[name]),
    )
    (seq_len, d_model), (vocab_size, _) = bare[:2]
    d_ff = bare[2 + _BLOCK.index("mlp.c_fc.weight")][1]
    sizes = {"vocab_size": vocab_size, "seq_len": seq_len, "n_layer": n_layer, "d_model": d_model, "d_ff": d_ff}
    try:
        config = GPTConfig(**sizes, n_head=n_head, norm="post")
        return config, as_ours(tensors, config)
    except (ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{path} is no GPT-1: {error}") from None


def _shapes(path: Path) -> list[tuple[int, ...]]:
    try:
        shapes = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(shapes, list) or not all(
        isinstance(shape, list) and shape and all(type(n) is int and 0 < n < 1 << 40 for n in shape) for shape in shapes
    ):
        raise CheckpointError(f"{path} is no list of shapes")
    return [tuple(shape) for shape in shapes]


def _arrays(path: Path) -> list[np.ndarray]:
    """The files' vectors in their order, mapped and not read; numpy's pickles are refused."""
    numbers = sorted(int(match[1]) for match in map(_FILE.fullmatch, (p.name for p in path.iterdir())) if match)
    if not numbers or numbers != list(range(len(numbers))):
        missing = min(set(range(len(numbers) + 1)) - set(numbers))
        raise CheckpointError(f"{path} lacks params_{missing}.npy")
    arrays = []
    for i in numbers:
        file = path / f"params_{i}.npy"
        try:
            # It compares the size in the header with the file's.
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:
            raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype != np.dtype("<f4"):
            raise CheckpointError(f"{file} is no vector of float32")
        arrays.append(array)
    return arrays


def _cut(arrays: list[np.ndarray], start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A copy of the elements from ``start`` on, of the vectors laid one behind the other."""
    n, found = math.prod(shape), []
    for array in arrays:
        found.append(array[max(start, 0) : max(start + n, 0)])
        start -= len(array)
    return torch.from_numpy(np.concatenate(found)).view(shape)
