"""Whether all ranks still hold the same model.

A bit that flips in one rank's memory, or a kernel that computes otherwise on one card, makes replicas drift apart
without a word, and the loss shows it late or never.
"""

import socket
from collections.abc import Iterable

import torch

from megagpt import dist
from megagpt.config.deepspeed import ResolvedConfig
from megagpt.errors import NumericError
from megagpt.train.engine import replicated

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprints(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """A sum over the bits of each tensor as this rank has it, int64 (n,); any single flipped bit changes it.

    What ZeRO-3 has split counts with the part that is whole on every rank.
    """
    sums = [t.detach().contiguous().view(_WORDS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack(sums)


def check(engine, config: ResolvedConfig, step: int) -> None:
    """Raise NumericError, on every rank, where ranks hold different values; every rank calls this."""
    if torch.distributed.get_world_size() == 1:
        return
    tensors = replicated(engine, config)
    mine = fingerprints(tensors.values())
    low, high = mine.clone(), mine.clone()
    torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX)
    differing = (low != high).nonzero().flatten().tolist()
    if not differing:
        return
    first = differing[0]
    found = dist.gather_json([int(mine[first]), socket.gethostname()])
    values = [value for value, _ in found]
    usual = max(values, key=values.count)
    # Of two ranks nobody knows which is right.
    odd = [f"rank {r} on {host}" for r, (value, host) in enumerate(found) if value != usual or len(found) == 2]
    error = NumericError(
        f"step {step}: {list(tensors)[first]} and {len(differing) - 1} other tensors differ between ranks "
        f"({', '.join(odd[:4])}); "
        "a processor or its memory may be faulty: exclude that host and go on from a checkpoint of before"
    )
    error.on_every_rank = True
    raise error
