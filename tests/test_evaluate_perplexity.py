"""Perplexities: exact over the whole set, the same for any batch size and number of ranks."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from distributed import run_ranks

from megagpt.evaluate.perplexity import IGNORED, evaluate, perplexities

VOCAB = 11


class Windows:
    """Twelve tokens after a first one that is only conditioned on, in windows of 5: 5 + 5 + 2 predictions."""

    n_windows = 3

    def __init__(self):
        self.tokens = np.random.default_rng(0).integers(0, VOCAB, 13)
        self.dataset = SimpleNamespace(n_tokens=13, info=SimpleNamespace(n_words=4, n_bytes=30))

    def batch(self, indices):
        ids = np.zeros((len(indices), 5), dtype=np.int64)
        targets = np.full((len(indices), 5), IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            window = self.tokens[5 * index : 5 * index + 6]
            ids[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
        return ids, targets


def bigram_loss(ids, targets):
    """The mean cross-entropy of a fixed bigram model over the scored targets."""
    table = torch.linspace(-2, 2, VOCAB * VOCAB).sin().view(VOCAB, VOCAB)
    return torch.nn.functional.cross_entropy(table[ids].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def by_hand():
    """Every prediction once, one at a time."""
    tokens = torch.from_numpy(Windows().tokens)
    losses = [bigram_loss(tokens[i : i + 1, None], tokens[i + 1 : i + 2, None]).item() for i in range(12)]
    return sum(losses) / 12


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_prediction_counts_once_whatever_the_batch_size(batch_size):
    result = evaluate(bigram_loss, Windows(), batch_size=batch_size)
    assert result["loss"] == pytest.approx(by_hand(), rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(by_hand()), rel=1e-6)


def _evaluate_on_this_rank(rank_count, batch_size):
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    result = evaluate(bigram_loss, Windows(), batch_size=batch_size, rank=rank, world_size=rank_count)
    torch.distributed.destroy_process_group()
    return result


@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_agree_with_one_rank_to_the_last_bit(batch_size):
    alone = evaluate(bigram_loss, Windows(), batch_size=batch_size)
    together = run_ranks(_evaluate_on_this_rank, 2, 2, batch_size)
    assert [result for result, _ in together] == [alone, alone]


def test_every_rank_makes_the_same_number_of_calls():
    """Three windows on four ranks: one rank has only padding, and under ZeRO-3 must take part all the same."""
    calls = []

    def counting(ids, targets):
        calls.append((targets != IGNORED).any().item())
        return bigram_loss(ids, targets)

    evaluate_alone_as_rank(3, counting)
    assert calls == [False]


def evaluate_alone_as_rank(rank, model_forward):
    """What rank ``rank`` of four does up to the reduction, which needs the others."""
    with pytest.raises(ValueError, match="process group"):
        evaluate(model_forward, Windows(), batch_size=1, rank=rank, world_size=4)


def test_a_limit_takes_windows_spread_over_the_whole_set():
    asked = []

    class Long(Windows):
        n_windows = 100

        def batch(self, indices):
            asked.extend(indices.tolist())
            return Windows.batch(self, indices * 0)

    evaluate(bigram_loss, Long(), batch_size=2, max_windows=4)
    assert asked == [0, 25, 50, 75]


def test_measures_are_those_worked_out_by_hand():
    """1 nat a token over 101 tokens, 100 of them predicted: 100 nats over 50 words and 200 bytes."""
    result = perplexities(1.0, 101, SimpleNamespace(n_words=50, n_bytes=200))
    assert result["ppl"] == pytest.approx(math.e)
    assert result["word_ppl"] == pytest.approx(math.exp(2))
    assert result["bits_per_byte"] == pytest.approx(0.5 / math.log(2))


def test_a_corpus_without_counts_has_only_token_measures():
    assert perplexities(1.0, 101, None).keys() == {"loss", "ppl"}


def test_a_perplexity_beyond_floating_point_is_infinite():
    assert perplexities(1000.0, 101, None)["ppl"] == math.inf
