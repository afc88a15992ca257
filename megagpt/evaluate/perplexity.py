"""Loss and perplexities over a validation set, the same on any number of ranks.

Token perplexities of different vocabularies cannot be compared, so word perplexity and bits per byte stand beside.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megagpt import dist

IGNORED = -100  # the target of a position that is not scored


def evaluate(
    model_forward: Callable[[Tensor, Tensor], Tensor],
    eval_windows,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_windows: int | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda windows: None,
) -> dict[str, float]:
    """``{loss, ppl}`` in nats a token, with ``word_ppl`` and ``bits_per_byte`` where the corpus knows its counts.

    ``model_forward(ids, targets)``, both int64 (B, T), returns the mean loss over the targets that are not -100; the
    caller has put the model into evaluation mode. ``eval_windows`` has ``n_windows``, ``batch(indices) -> (ids,
    targets)`` as numpy int64 (B, T), and ``dataset``. Every rank makes the same number of calls, as ZeRO-3 needs, and
    every window counts once: batch j is the same whatever the number of ranks, rank j % world_size computes it, and
    the sums are added in the order of j. ``max_windows`` limits the work to windows evenly spread over the set.
    ``progress`` is told how many windows all ranks together have computed.
    """
    batches = _batches(eval_windows.n_windows, batch_size, max_windows)
    rounds = -(-len(batches) // world_size)
    sums = torch.zeros(rounds * world_size, 2, dtype=torch.float64)  # nats and scored tokens of each batch
    with torch.no_grad():
        for j in range(rank, rounds * world_size, world_size):
            dist.beat()
            progress(j * batch_size)
            ids, targets = _padded(eval_windows, batches[j] if j < len(batches) else batches[0][:0], batch_size)
            loss = model_forward(torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device))
            scored = int((targets != IGNORED).sum())
            if scored:  # the mean over nothing is not a number
                sums[j, 0], sums[j, 1] = loss.double().item() * scored, scored
    if world_size > 1:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)  # every entry has one non-zero term: the sum is exact
        sums = sums.cpu()
    nats, tokens = sums.sum(dim=0).tolist()
    return perplexities(nats / tokens, eval_windows.dataset.n_tokens, eval_windows.dataset.info)


def perplexities(loss: float, n_tokens: int, info) -> dict[str, float]:
    """The measures that follow from the mean ``loss`` in nats over a corpus of ``n_tokens`` tokens.

    The corpus's total nats are the mean times its predictable tokens, which are all but the very first. ``info`` has
    ``n_words`` and ``n_bytes`` of the text, or is None for a corpus without a sidecar.
    """
    result = {"loss": loss, "ppl": _exp(loss)}
    nats = loss * (n_tokens - 1)
    if info is not None and info.n_words:
        result["word_ppl"] = _exp(nats / info.n_words)
    if info is not None and info.n_bytes:
        result["bits_per_byte"] = nats / math.log(2) / info.n_bytes
    return result


def _batches(n_windows: int, batch_size: int, max_windows: int | None) -> list[np.ndarray]:
    """The window numbers of each batch."""
    n = n_windows if max_windows is None else min(n_windows, max_windows)
    chosen = np.arange(n, dtype=np.int64) * n_windows // n
    return [chosen[start : start + batch_size] for start in range(0, n, batch_size)]


def _padded(eval_windows, indices: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and targets of ``batch_size`` windows: those of ``indices``, then window 0 with nothing scored."""
    padding = np.zeros(batch_size - len(indices), dtype=np.int64)
    ids, targets = eval_windows.batch(np.concatenate([indices, padding]))
    targets = targets.copy()
    targets[len(indices) :] = IGNORED
    return ids, targets


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
