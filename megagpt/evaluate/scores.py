"""Log-probabilities of given tokens: what choosing between answers is made of."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megagpt import dist
from megagpt.dist import gather_json

_LOGITS = 1 << 25  # at once, 128 MB in float32


class Scored(NamedTuple):
    """Of the scored tokens of a sequence: log P of each given all before it, and whether all were the likeliest."""

    log_probs: list[float]
    greedy: bool


def score(
    model,
    sequences: Sequence[tuple[Sequence[int], int]],
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] = lambda sequences: None,
) -> list[Scored]:
    """The score of every (ids, first): of ids[first:], with ``first`` at least 1, in nats.

    What is longer than the context is predicted from its last tokens. Batches are the same for any number of ranks,
    rank j % world_size computes batch j, and every rank returns all scores. Every rank calls the model as often as any
    other, as ZeRO-3 needs: where the batches do not go round, the shortest one is computed again.
    """
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i][0]))
    batches = [longest_first[at : at + batch_size] for at in range(0, len(sequences), batch_size)]
    mine = []
    for j in range(rank, -(-len(batches) // world_size) * world_size, world_size):
        dist.beat()
        progress(j * batch_size)
        chosen = batches[min(j, len(batches) - 1)]
        scores = _score_batch(model, [sequences[i] for i in chosen])
        if j < len(batches):
            mine += [[i, *s] for i, s in zip(chosen, scores, strict=True)]
    everything = gather_json(mine) if world_size > 1 else [mine]
    found = {i: Scored(log_probs, greedy) for part in everything for i, log_probs, greedy in part}
    return [found[i] for i in range(len(sequences))]


@torch.no_grad()  # not inference_mode: a model in training must not keep tensors of that mode
def _score_batch(model, sequences: Sequence[tuple[Sequence[int], int]]) -> list[Scored]:
    device, room = model.wte.weight.device, model.config.seq_len + 1
    kept = [(list(ids)[-room:], max(1, first - max(0, len(ids) - room))) for ids, first in sequences]
    row_of: dict[tuple[int, ...], int] = {}  # answers of one token to one question are read together
    for ids, _ in kept:
        row_of.setdefault(tuple(ids[:-1]), len(row_of))
    T = max(map(len, row_of))
    ids = torch.tensor([[*read, *[0] * (T - len(read))] for read in row_of], device=device)
    lengths = torch.tensor([len(read) for read in row_of], device=device)
    rows = (torch.arange(T, device=device) < lengths[:, None]).flatten().nonzero()[:, 0]
    begins = [0, *lengths.cumsum(0).tolist()]
    at = [begins[row_of[tuple(ids[:-1])]] + p for ids, first in kept for p in range(first - 1, len(ids) - 1)]
    targets = torch.tensor([token for ids, first in kept for token in ids[first:]], device=device, dtype=torch.long)
    at = torch.tensor(at, device=device, dtype=torch.long)
    log_probs, likeliest = model(
        ids, rows=rows, then=lambda hidden, words: _predicted(model.ops, hidden[at], words, targets)
    )
    log_probs, likeliest = log_probs.tolist(), likeliest.tolist()
    scores, begin = [], 0
    for ids, first in kept:
        end = begin + len(ids) - first
        scores.append(Scored(log_probs[begin:end], all(likeliest[begin:end])))
        begin = end
    return scores


def _predicted(ops, hidden: Tensor, words: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log P of each of ``targets`` (N,) from ``hidden`` (N, D), and whether it is the likeliest token; both (N,)."""
    log_probs, likeliest = [], []
    n = max(1, _LOGITS // len(words))
    for part, wanted in zip(hidden.split(n), targets.split(n), strict=True):
        logits = ops.linear(part, words).float()
        log_probs.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1))
        likeliest.append(logits.argmax(1) == wanted)
    return torch.cat(log_probs), torch.cat(likeliest)
