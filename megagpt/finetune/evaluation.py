"""Answers for every example of a split, the same on any number of ranks."""

import numpy as np
import torch

from megagpt import dist
from megagpt.finetune import objective
from megagpt.finetune.batches import Encoded, collate
from megagpt.finetune.model import Classifier
from megagpt.finetune.spec import TaskSpec

BATCH = 32  # examples at once; not the run's own, so that results don't depend on how its batch is cut


@torch.no_grad()
def answers(
    model: Classifier, encoded: Encoded, *, device, rank: int = 0, world_size: int = 1, batch_size: int = BATCH
) -> tuple[np.ndarray, float | None]:
    """The outputs of all examples, float64 (N, K) or (N,), and their mean loss where targets are known.

    ``model`` is in evaluation mode. Examples are sorted by length; batch j is the same for any number of ranks, and
    every rank makes the same number of calls, as ZeRO-3 needs.
    """
    spec, N = model.spec, len(encoded)
    order = np.argsort(-encoded.longest(), kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, N, batch_size)]
    found = torch.zeros(N, _width(spec, encoded) + 1, dtype=torch.float64)  # outputs, then the loss
    for j in range(rank, -(-len(batches) // world_size) * world_size, world_size):
        dist.beat()
        mine = batches[min(j, len(batches) - 1)]
        batch = collate(encoded, mine, n_real=len(mine), example_weight=1.0, sequence_weight=0.0)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        logits = model.logits(batch)
        if j >= len(batches):
            continue
        output = objective.outputs(spec.kind, logits, ordinal=spec.ordinal, parents=spec.parents)
        found[mine, : output.shape[1] if output.dim() == 2 else 1] = output.view(len(mine), -1).cpu()
        if "targets" in batch:
            found[mine, -1] = objective.task_losses(spec.kind, logits, batch["targets"], spec.parents).double().cpu()
    if world_size > 1:
        found = found.to(device)
        torch.distributed.all_reduce(found)  # every entry has one term that is not zero: the sum is exact
        found = found.cpu()
    outputs, losses = found[:, :-1].numpy(), found[:, -1]
    if spec.kind == "regress" or spec.ordinal:
        outputs = outputs[:, 0] * spec.scale + spec.shift
    return outputs, None if encoded.targets is None else float(losses.mean())


def _width(spec: TaskSpec, encoded: Encoded) -> int:
    if spec.kind == "choose":
        return max(len(units) for units in encoded.units)
    return 1 if spec.kind == "regress" or spec.ordinal else spec.n_outputs
