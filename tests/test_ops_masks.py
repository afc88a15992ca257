"""Dropout masks: a function of seed and position, at the right rate, without patterns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.ops.masks import HashedMasks, PooledMasks, random_word, random_words, row_blocks

ALL = slice(None)
MASKS = pytest.mark.parametrize("masks", [HashedMasks, PooledMasks])


def whole(masks, seed, p, *shape):
    """The multipliers of all M x R x C elements."""
    return masks(torch.tensor(seed), p, shape)(ALL, ALL, ALL)


def test_words_are_those_of_splitmix64():
    """From the reference implementation, https://prng.di.unimi.it/splitmix64.c, started at 1234567."""
    golden = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [random_word(1234567, i) for i in range(5)] == golden
    assert [word % 2**64 for word in random_words(torch.tensor(1234567), 5).tolist()] == golden


@given(seed=st.integers(0, 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_both_forms_of_the_generator_agree(seed):
    assert [word % 2**64 for word in random_words(torch.tensor(seed), 3).tolist()] == [
        random_word(seed, i) for i in range(3)
    ]


def test_the_hash_is_the_documented_one():
    """Bit for bit, in Python's numbers: what a kernel has to compute."""
    seed, p, (M, R, C) = 99, 0.3, (2, 3, 5)
    words = [random_word(seed, i) for i in range((M * (R + C) + 1) // 2)]
    keys = [half & ~255 for word in words for half in (word & 0xFFFFFFFF, word >> 32)]
    dropped = round(p * 2**24)
    expected = torch.zeros(M, R, C)
    for m in range(M):
        for r in range(R):
            for c in range(C):
                h = ((keys[m * R + r] ^ keys[M * R + m * C + c]) * 0xC2B2AF) % 2**32
                h = h - 2**32 if h >= 2**31 else h
                expected[m, r, c] = 2**24 / (2**24 - dropped) if h >= 256 * dropped - 2**31 else 0
    torch.testing.assert_close(whole(HashedMasks, seed, p, M, R, C), expected)
    assert 0 < (expected == 0).sum() < expected.numel()


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_tile_of_the_hashed_mask_is_cut_from_the_whole(data):
    shape = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    cuts = [data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(sorted)) for n in shape]
    cuts = tuple(slice(begin, end) for begin, end in cuts)
    masks = HashedMasks(torch.tensor(3), 0.5, shape)
    assert torch.equal(masks(*cuts), masks(ALL, ALL, ALL)[cuts])


def test_a_tile_of_the_pool_is_the_same_each_time_whatever_came_before():
    shape, tile = (4, 300, 500), (slice(1, 3), slice(128, 256), slice(0, 256))
    first = PooledMasks(torch.tensor(3), 0.5, shape)(*tile).clone()
    masks = PooledMasks(torch.tensor(3), 0.5, shape)
    masks(ALL, ALL, ALL)
    assert torch.equal(masks(*tile), first)
    assert not torch.equal(PooledMasks(torch.tensor(4), 0.5, shape)(*tile), first)


def test_a_tile_larger_than_the_pools_windows_is_put_together():
    n = PooledMasks.block_elements
    mask = whole(PooledMasks, 1, 0.5, 1, 5, n // 2)
    assert mask.shape == (1, 5, n // 2)
    assert (mask.view(-1)[: n // 2] != mask.view(-1)[n : n + n // 2]).double().mean() == pytest.approx(0.5, abs=0.01)


@MASKS
@pytest.mark.parametrize("p", [1e-4, 0.1, 0.5, 0.9])
def test_the_rate_is_kept_and_the_expectation_is_one(masks, p):
    n = 1 << 20
    mask = whole(masks, 11, p, 4, 512, n // 2048)
    noise = 5 * (p * (1 - p) / n) ** 0.5
    assert (mask == 0).double().mean().item() == pytest.approx(p, abs=noise)
    assert mask.double().mean().item() == pytest.approx(1, abs=noise / (1 - p))
    assert len(mask.unique()) == 2


@MASKS
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rows_columns_and_rectangles_show_no_pattern(masks, p):
    """With x = (kept - (1 - p)) / sqrt(p (1 - p)): the mean of x x' over pairs and of x x' x'' x''' over rectangles."""
    n, seeds = 200, range(40)
    rows, columns, rectangles, between = [], [], [], []
    previous = None
    for seed in seeds:
        kept = (whole(masks, seed, p, 1, n, n)[0] > 0).double()
        x = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
        for correlations, m in ((rows, x), (columns, x.mT)):
            correlations.append((m.sum(1).square() - m.square().sum(1)).mean() / (n * (n - 1)))
        products = (x @ x.mT).square() - x.square() @ x.square().mT
        rectangles.append((products.sum() - products.trace()) / (n * (n - 1)) ** 2)
        if previous is not None:
            between.append((x * previous).mean())
        previous = x
    pairs, independent = n * n * (n - 1) / 2 * len(seeds), 5
    for correlations in (rows, columns):
        assert abs(torch.stack(correlations).mean()) < independent / pairs**0.5
    assert abs(torch.stack(between).mean()) < independent / (n * n * (len(seeds) - 1)) ** 0.5
    assert abs(torch.stack(rectangles).mean()) < 1e-3


@pytest.mark.parametrize(("rows", "columns", "elements"), [(10, 3, 7), (10, 3, 1), (1, 5, None), (4, 4, 16), (0, 3, 7)])
def test_blocks_cover_every_row_once_and_hold_no_more_than_asked(rows, columns, elements):
    blocks = row_blocks(rows, columns, elements)
    assert [r for block in blocks for r in range(rows)[block]] == list(range(rows))
    for block in blocks:
        n = block.stop - block.start
        assert n == 1 or elements is None or n * columns <= elements
