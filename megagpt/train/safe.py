"""Loading DeepSpeed's shards, which are pickles, without running what they may hold.

torch is told so by TORCH_FORCE_WEIGHTS_ONLY_LOAD (:mod:`megagpt`), which holds for DeepSpeed's own calls too. A file
that holds something else is refused before any rank has begun to load: a rank alone would leave its peers waiting.
"""

import pickle
from pathlib import Path

import torch

from megagpt import dist
from megagpt.errors import CheckpointError


def allow_checkpoint_classes() -> None:
    """Name the four plain classes that DeepSpeed puts in its checkpoints; everything else in a pickle is refused."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def refuse_code(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Raise CheckpointError where a shard of ``folder`` holds anything but tensors and plain values.

    With ``parts`` ranks each looks at the files ``part``, ``part + parts``, ...; the tensors themselves are not read.
    """
    allow_checkpoint_classes()
    for path in sorted(folder.glob("*.pt"))[part::parts]:
        try:
            torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except pickle.UnpicklingError as error:
            raise foreign(path, error) from None


def refuse_code_everywhere(folder: Path) -> None:
    """:func:`refuse_code` with the reading shared out: every rank calls it and gets the same error."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dist.everywhere(lambda: refuse_code(folder, part=rank, parts=world_size))


def foreign(path: Path, error: Exception) -> CheckpointError:
    """The error of a file that holds ``error``'s objects."""
    return CheckpointError(
        f"{path} holds something other than tensors and plain values and was refused, for loading it could run code "
        f"({str(error).splitlines()[0][:200]}); use a checkpoint that MegaGPT wrote"
    )
