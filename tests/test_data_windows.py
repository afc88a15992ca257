"""Which tokens sample i consists of: a pure function of (seed, i), each window once an epoch, exact blends."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_indexed import write

from megagpt.data.indexed import IndexedDataset
from megagpt.data.permutation import permute
from megagpt.data.windows import Blend, EvalWindows, Windows
from megagpt.errors import ConfigError, DataError


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_a_permutation_is_a_bijection(n, seed):
    assert sorted(permute(np.arange(n), n, seed).tolist()) == list(range(n))


def plain_permute(index: int, n: int, seed: int) -> int:
    """The same permutation in plain integers, to hold the vectorised one against."""
    mask = 2**64 - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    a = next(a for a in (int(n**0.5) + d for d in (-1, 0, 1, 2)) if a > 0 and (a - 1) ** 2 <= n - 1 < a * a)
    b = -(-n // a)
    while True:
        left, right = divmod(index, b)
        for r in range(6):
            key = mix((seed + (r + 1) * 0x9E3779B97F4A7C15) & mask)
            if r % 2 == 0:
                left = (left + (mix((right + key) & mask) >> 1)) % a
            else:
                right = (right + (mix((left + key) & mask) >> 1)) % b
        index = left * b + right
        if index < n:
            return index


@given(n=st.integers(1, 10**15), seed=st.integers(0, 2**63), data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_entry_of_a_permutation_is_had_alone(n, seed, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
    expected = [plain_permute(i, n, seed) for i in indices]
    assert permute(np.array(indices), n, seed).tolist() == expected
    assert [permute(np.array([i]), n, seed).tolist() for i in indices] == [[i] for i in expected]
    assert permute(np.array(indices), n, np.full(len(indices), seed, np.uint64)).tolist() == expected


def test_permutations_of_different_seeds_differ_and_look_random():
    """Each of 5 places holds each of 5 values about equally often over many seeds: chi-squared with 16 degrees."""
    seeds = 4000
    counts = np.zeros((5, 5))
    for seed in range(seeds):
        counts[np.arange(5), permute(np.arange(5), 5, seed)] += 1
    expected = seeds / 5
    assert ((counts - expected) ** 2 / expected).sum() < 45  # exceeded once in ten thousand random tables


def test_an_index_outside_of_the_range_is_refused():
    with pytest.raises(IndexError):
        permute(np.array([7]), 7, 0)


@pytest.fixture
def sixteen(tmp_path):
    return IndexedDataset(write(tmp_path, [list(range(16))]))


def test_an_epoch_is_every_window_once(sixteen):
    """The worked example of the module: sixteen tokens, windows [0..4], [4..8], [8..12], token 13 on is left over."""
    windows = Windows(sixteen, 4, sampler="epoch", seed=3)
    expected = [list(range(5)), list(range(4, 9)), list(range(8, 13))]
    assert windows.n_windows == 3
    for epoch in range(20):
        assert sorted(windows.batch(np.arange(3) + 3 * epoch).tolist()) == expected


def test_every_epoch_has_another_order(tmp_path):
    windows = Windows(IndexedDataset(write(tmp_path, [list(range(1000))])), 4, sampler="epoch", seed=3)
    epochs = [tuple(windows.starts(np.arange(249) + 249 * epoch)) for epoch in range(8)]
    assert len(set(epochs)) == 8


def test_random_windows_start_anywhere(sixteen):
    windows = Windows(sixteen, 4, sampler="random", seed=3)
    counts = Counter(windows.starts(np.arange(12_000)).tolist())
    assert sorted(counts) == list(range(12))
    assert all(800 < n < 1200 for n in counts.values())


@pytest.mark.parametrize("sampler", ["random", "epoch"])
def test_a_sample_depends_on_the_seed_and_its_number_alone(tmp_path, sampler):
    """Asked for alone, in any order, by any of several ranks, before or after any other sample."""
    dataset = IndexedDataset(write(tmp_path, [list(range(5000))]))
    n = 9000  # more than the numbers worked out together
    expected = Windows(dataset, 16, sampler=sampler, seed=7).batch(np.arange(n))
    assert not np.array_equal(expected, Windows(dataset, 16, sampler=sampler, seed=8).batch(np.arange(n)))
    fresh = Windows(dataset, 16, sampler=sampler, seed=7)
    shuffled = np.random.default_rng(0).permutation(n)
    assert np.array_equal(fresh.batch(shuffled), expected[shuffled])
    for world_size in (1, 2, 8):
        ranks = [Windows(dataset, 16, sampler=sampler, seed=7) for _ in range(world_size)]
        for step in range(0, 64, 16):
            parts = [windows.batch(step + np.arange(16)[rank::world_size]) for rank, windows in enumerate(ranks)]
            for rank, part in enumerate(parts):
                assert np.array_equal(part, expected[step : step + 16][rank::world_size])


def test_samples_are_int64_of_one_more_than_seq_len(sixteen):
    batch = Windows(sixteen, 4).batch(np.arange(6))
    assert (batch.dtype, batch.shape) == (np.int64, (6, 5))
    assert Windows(sixteen, 4).batch(np.arange(0)).shape == (0, 5)


def test_a_corpus_shorter_than_a_sample_is_refused(sixteen):
    assert Windows(sixteen, 15, sampler="epoch").n_windows == 1
    with pytest.raises(DataError, match="has 16 tokens and one sample of seq_len=16 needs 17"):
        Windows(sixteen, 16)


def test_an_unknown_sampler_is_refused(sixteen):
    with pytest.raises(ConfigError, match=r"did you mean 'epoch'"):
        Windows(sixteen, 4, sampler="epohc")


@pytest.fixture
def three(tmp_path):
    """Three corpora whose tokens tell which they are of."""
    return [IndexedDataset(write(tmp_path, [[k] * 500], name=f"c{k}")) for k in range(3)]


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3), blocks=st.integers(1, 6), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_a_blend_has_the_weights_asked_for_at_any_length(weights, blocks, seed):
    # choosing looks at nothing else
    source = SimpleNamespace(seq_len=4, n_windows=10, dataset=SimpleNamespace(dtype=np.dtype(np.uint16)))
    blend = Blend([(weight, source) for weight in weights], seed=seed)
    n = 1024 * blocks
    source, within = blend.choose(np.arange(n))
    for s, weight in enumerate(weights):
        mine = within[source == s]
        assert sorted(mine.tolist()) == list(range(len(mine)))  # each sample of a corpus once, none left out
        assert abs(len(mine) - n * weight / sum(weights)) < 2


def test_a_blend_reads_the_samples_of_its_parts(three):
    parts = [Windows(dataset, 4, sampler="epoch", seed=k) for k, dataset in enumerate(three)]
    blend = Blend(list(zip([0.5, 0.3, 0.2], parts, strict=True)), seed=1)
    source, within = blend.choose(np.arange(300))
    batch = blend.batch(np.arange(300))
    assert np.array_equal(batch[:, 0], source)
    for s, part in enumerate(parts):
        assert np.array_equal(batch[source == s], part.batch(within[source == s]))
    order = np.random.default_rng(0).permutation(300)
    assert np.array_equal(Blend(list(zip([5, 3, 2], parts, strict=True)), seed=1).batch(order), batch[order])


def test_a_blend_tells_how_often_each_corpus_is_seen(three):
    parts = [Windows(dataset, 4) for dataset in three]
    rows = Blend(list(zip([2, 1, 1], parts, strict=True))).table(1000)
    assert [(row.weight, row.samples) for row in rows] == [(0.5, 500), (0.25, 250), (0.25, 250)]
    assert rows[0].epochs == 500 / 124
    assert rows[2].name.endswith("c2")


@pytest.mark.parametrize("weights", [[1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]])
def test_a_weight_that_is_no_positive_number_is_refused(three, weights):
    with pytest.raises(ConfigError, match="above zero"):
        Blend(list(zip(weights, [Windows(dataset, 4) for dataset in three], strict=True)))


@given(n_tokens=st.integers(2, 60), seq_len=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_validation_scores_every_token_but_the_first_once(tmp_path_factory, n_tokens, seq_len):
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("valid"), [list(range(n_tokens))]))
    windows = EvalWindows(dataset, seq_len)
    ids, targets = windows.batch(np.arange(windows.n_windows))
    scored = targets != -100
    assert targets[scored].tolist() == list(range(1, n_tokens))
    assert ids[scored].tolist() == list(range(n_tokens - 1))
    assert ids.shape == targets.shape == (windows.n_windows, seq_len)


def test_a_validation_set_of_one_token_is_refused(tmp_path):
    with pytest.raises(DataError, match="at least two"):
        EvalWindows(IndexedDataset(write(tmp_path, [[1]])), 4)
