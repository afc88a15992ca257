"""The whole weights of a saved model in float32, one tensor at a time, without the engine that saved them.

Where DeepSpeed 0.19 puts the parts of a parameter under each ZeRO stage, its own ``zero_to_fp32.py`` tells.
"""

import math
import pickle
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from megagpt import dist
from megagpt.errors import CheckpointError
from megagpt.model.gpt import decays
from megagpt.model.tensors import Tensors, read_safetensors
from megagpt.train import manifest
from megagpt.train.safe import foreign

# Classes of DeepSpeed in its checkpoints, of which nothing is needed here. Everything else in a pickle is refused.
_UNREAD = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_RANK = re.compile(r"zero_pp_rank_([0-9]+)_")
Parts = list[Tensor]  # one-dimensional, to be read as if they lay one behind the other


def find_weights(path: Path, problem: Callable[[Path], str | None] = manifest.problem) -> Path:
    """The checkpoint folder or the .safetensors file that ``path`` means.

    ``path`` is a run folder (its newest intact checkpoint; newer ones that are damaged are told on stderr), a
    checkpoint folder, a .safetensors file, or a folder with a model.safetensors. ``problem`` is how a checkpoint is
    verified. Raises CheckpointError when there is nothing usable.
    """
    path = manifest.weights_path(Path(path))
    if path.suffix == ".safetensors":
        return path
    folder, passed_over = manifest.locate(path, problem)
    if dist.is_main():
        for note in passed_over:
            print(f"warning: {note}", file=sys.stderr, flush=True)
    return folder


def open_weights(path: Path, problem: Callable[[Path], str | None] = manifest.problem) -> tuple[Tensors, dict]:
    """The weights of what :func:`find_weights` finds, whatever ZeRO stage they were saved under, and the model's
    settings, which a .safetensors file has in its metadata under ``config``. Raises CheckpointError.
    """
    folder = find_weights(path, problem)
    if folder.suffix == ".safetensors":
        return read_safetensors(folder), manifest.read_source(folder).model
    stage = manifest.read(folder)["zero_stage"]
    try:
        tensors = _unsharded(folder) if stage == 0 else _sharded(folder, stage)
    except pickle.UnpicklingError as error:
        raise foreign(folder, error) from None
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise CheckpointError(f"{folder} is not laid out as DeepSpeed 0.19 lays checkpoints out ({why})") from None
    return tensors, manifest.read_source(folder).model


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict]:
    """:func:`open_weights`, all at once."""
    tensors, model = open_weights(path)
    return tensors.all(), model


class _Unread:
    """Stands in the place of what a checkpoint holds beside tensors and plain values."""

    def __init__(self, *_) -> None:
        pass


def _load(path: Path) -> dict:
    """Its tensors lie in the file, which is mapped: what is not looked at is not read."""
    with torch.serialization.safe_globals([(_Unread, name) for name in _UNREAD]):
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)


def _unsharded(folder: Path) -> Tensors:
    """Weights as a run without ZeRO updates them: its float32 copies where it trained in 16 bits.

    DeepSpeed keeps these for each parameter group as a list or, under its own Adam, one behind the other.
    """
    saved = _load(folder / "mp_rank_00_model_states.pt")
    weights, optimizer = saved["module"], saved["optimizer"]
    masters = optimizer.get("fp32_groups") or optimizer.get("fp32_groups_flat")
    if masters is None:
        return Tensors.of(weights)
    groups = [[name for name in weights if decays(name) == wanted] for wanted in (True, False)]  # as the optimiser's
    shapes = [{name: tuple(weights[name].shape) for name in group} for group in groups if group]
    parts = [[master] if torch.is_tensor(master) else [x.flatten() for x in master] for master in masters]
    return _laid_out(shapes, parts, lambda group, start, n: cut(parts[group], start, n), lambda shape: math.prod(shape))


def _sharded(folder: Path, stage: int) -> Tensors:
    """Weights of ZeRO 1 to 3, from the float32 parts that each rank updates."""
    files = sorted(folder.glob("*_optim_states.pt"), key=lambda path: int(_RANK.search(path.name)[1]))
    ranks = [_load(path)["optimizer_state_dict"] for path in files]
    n_ranks = ranks[0]["partition_count"]
    n_ranks = max(n_ranks) if isinstance(n_ranks, list) else n_ranks
    if n_ranks != len(ranks):
        raise CheckpointError(f"{folder} holds the parts of {len(ranks)} ranks and was saved by {n_ranks}")
    saved = _load(min(folder.glob("*_model_states.pt")))
    shapes = [{name: tuple(shape) for name, shape in group.items()} for group in saved["param_shapes"]]
    if stage == 3:  # every parameter is cut into as many equal parts as there are ranks, the last one filled up
        parts = [rank["fp32_flat_groups"] for rank in ranks]
        parts = [[part] if torch.is_tensor(part) else part for part in parts]

        def read(_: int, start: int, n: int) -> Tensor:
            return torch.cat([cut(part, start, n) for part in parts])

        shapes = [{name: shape for group in shapes for name, shape in group.items()}]
        return _laid_out(shapes, parts, read, lambda shape: -(-math.prod(shape) // n_ranks))
    # Every group is one long vector, cut into equal parts.
    groups = [[rank["single_partition_of_fp32_groups"][i] for rank in ranks] for i in range(len(shapes))]
    paddings = ranks[0].get("param_alignment_paddings")
    return _laid_out(
        shapes, groups, lambda group, start, n: cut(groups[group], start, n), lambda shape: math.prod(shape), paddings
    )


def _laid_out(
    shapes: list[dict[str, tuple[int, ...]]],
    parts: list[Parts],
    read: Callable[[int, int, int], Tensor],
    length: Callable[[tuple[int, ...]], int],
    paddings: list[list[int]] | None = None,
) -> Tensors:
    """Parameters that lie one behind the other in each group, ``length`` elements each and their padding.

    ``read`` gives the elements of a group from a start on. Raises ValueError where a group has fewer elements.
    """
    places = {}
    for group, named in enumerate(shapes):
        start = 0
        for i, (name, shape) in enumerate(named.items()):
            places[name] = group, start, length(shape)
            start += length(shape) + (paddings[group][i] if paddings else 0)
        if start > sum(part.numel() for part in parts[group]):
            raise ValueError(f"{start:,} elements are needed in group {group}, more than are there")
    whole = {name: shape for named in shapes for name, shape in named.items()}
    return Tensors(whole, lambda name: read(*places[name])[: math.prod(whole[name])].view(whole[name]).float())


def cut(parts: Iterable[Tensor], start: int, n: int) -> Tensor:
    """``n`` elements of the parts laid one behind the other, from ``start`` on."""
    found = []
    for part in parts:
        found.append(part[max(start, 0) : max(start + n, 0)])
        start -= part.numel()
    return torch.cat(found).detach()  # DeepSpeed saves them as parameters
