"""Scores of options: log-probabilities of their tokens, of one model or of several together."""

import math
from collections.abc import Callable, Sequence

from megagpt.zeroshot.tasks import Asked, Sequences

LogProbs = list[list[float]]  # of every option its scored tokens', in nats


def token_log_probs(
    model,
    sequences: Sequences,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] = lambda sequences: None,
) -> LogProbs:
    """log P of each scored token given all before it, the same on every rank and for any number of ranks.

    ``model`` is a ``GPT`` in evaluation mode. Sequences of about the same length share a forward pass.
    """
    from megagpt.evaluate.scores import score

    asked = [i for i, (ids, first) in enumerate(sequences) if first < len(ids)]  # a single first token is not scored
    found: LogProbs = [[] for _ in sequences]
    place = {"rank": rank, "world_size": world_size}
    scored = score(model, [sequences[i] for i in asked], batch_size=batch_size, **place, progress=progress)
    for i, s in zip(asked, scored, strict=True):
        found[i] = s.log_probs
    return found


def option_scores(asked: Asked, models: Sequence[LogProbs], *, same_tokens: bool = True) -> list[list[float]]:
    """The score of every option of every question, of the models of ``models`` together.

    Models with the ``same_tokens`` average each token's probability, and the product or geometric mean over tokens is
    taken of that (Trinh and Le 2018, section 4). Others average the options' scores.
    """
    mean = asked.heuristic.mean(asked.scoring)
    if same_tokens:
        flat = [_reduced(_averaged(option), mean) for option in zip(*models, strict=True)]
    else:
        scores = [[_reduced(option, mean) for option in log_probs] for log_probs in models]
        flat = [math.fsum(option) / len(models) for option in zip(*scores, strict=True)]
    found, at = [], 0
    for question in asked.all_questions:
        found.append(flat[at : at + len(question.options)])
        at += len(question.options)
    return found


def _averaged(models: Sequence[Sequence[float]]) -> list[float]:
    """log of the mean over models of each token's probability; computed from the largest one, which cannot vanish."""
    if len(models) == 1:
        return list(models[0])
    averaged = []
    for log_probs in zip(*models, strict=True):
        largest = max(log_probs)
        averaged.append(largest + math.log(math.fsum(math.exp(x - largest) for x in log_probs) / len(models)))
    return averaged


def _reduced(log_probs: Sequence[float], mean: bool) -> float:
    """The sum or mean. A text without a token to score, one of a single token that follows nothing, is certain."""
    total = math.fsum(log_probs)
    return total / len(log_probs) if mean and log_probs else total
