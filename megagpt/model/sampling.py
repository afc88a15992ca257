"""The choice of the next token from its logits: temperature, then top-k, then the nucleus, then the draw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.errors import ConfigError

TOP_P_RULES = ("smallest", "reference")
_COLDEST = 1e-30  # a lower temperature would be rounded to zero in float32
_SORTED = 1024  # logits in which a nucleus is looked for before all are sorted
_BELOW_ONE = 1 - 2.0**-40


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one text are chosen. Raises ConfigError for numbers that cannot be.

    ``top_p_rule`` "smallest" keeps the fewest tokens whose probability reaches ``top_p``; "reference" is that of
    OpenAI's released sampler: the most tokens whose probability does not exceed it, at least one.
    """

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # tokens less likely than the k-th are dropped; 0 drops none
    top_p: float = 1.0  # share of the probability that is kept, the likeliest tokens first; 1 keeps all
    top_p_rule: str = "smallest"
    repetition_penalty: float = 1.0  # divides positive logits of tokens that were there, multiplies negative ones
    seed: int = 0  # of the text's own stream of random numbers

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature {self.temperature} must be at least 0")
        if self.top_k < 0:
            raise ConfigError(f"top_k {self.top_k} must be at least 0, which draws from all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must be above 0 and at most 1, which draws from all tokens")
        if self.top_p_rule not in TOP_P_RULES:
            raise ConfigError(f"top_p_rule {self.top_p_rule!r} is unknown; choose {' or '.join(TOP_P_RULES)}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty {self.repetition_penalty} must be above 0; 1 is none")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed {self.seed} must be at least 0 and below 2^63")


class Stream:
    """The random numbers of one text, whatever texts are beside it."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> float:
        """A number from 0 on and below 1."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item() * _BELOW_ONE


def draw(logits: Tensor, sampling: Sampling, stream: Stream, seen: Sequence[int]) -> Tensor:
    """One token, 0-d int64, of logits (V,) after the tokens ``seen``."""
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = _penalised(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax()
    sums = probabilities(logits, sampling).cumsum(0)
    return torch.searchsorted(sums, stream.next() * sums[-1], right=True)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """With which probability each token is drawn, float64 (V,), from logits (V,) and a temperature above 0."""
    logits = (logits.float() - logits.max()) / max(sampling.temperature, _COLDEST)  # the largest stays finite
    if sampling.top_k:
        logits = _cut(logits, logits.topk(min(sampling.top_k, len(logits))).values[-1])
    if sampling.top_p < 1:
        logits = _cut(logits, _least_of_nucleus(logits, sampling.top_p, sampling.top_p_rule))
    return logits.double().softmax(0)


def _cut(logits: Tensor, least: Tensor) -> Tensor:
    """``logits`` without those strictly below ``least``: equals stay or go together."""
    return logits.masked_fill(logits < least, -torch.inf)


def _least_of_nucleus(logits: Tensor, top_p: float, rule: str) -> Tensor:
    total = logits.double().logsumexp(0)
    for n in (min(_SORTED, len(logits)), len(logits)):
        largest = logits.topk(n).values
        reached = (largest.double() - total).exp().cumsum(0)
        if reached[-1] > top_p:
            break
    last = (reached < top_p).sum() if rule == "smallest" else (reached <= top_p).sum() - 1
    return largest[last.clamp(0, len(largest) - 1)]


def _penalised(logits: Tensor, penalty: float, seen: Sequence[int]) -> Tensor:
    """Keskar et al., "CTRL", section 4.1, in the form for logits of either sign."""
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    found = logits[ids]
    return logits.index_put((ids,), torch.where(found > 0, found / penalty, found * penalty))
