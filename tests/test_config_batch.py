"""Batch arithmetic: global = micro x accumulation x ranks, whatever numbers are given."""

import math
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megagpt.config.batch import Batch, nearest_valid, solve

sizes = st.integers(1, 200)
maybe = st.none() | sizes


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        ((8, 4, 512), 16, (8, 4, 512)),
        ((8, None, 512), 16, (8, 4, 512)),
        ((None, 4, 512), 16, (8, 4, 512)),
        ((8, 4, None), 16, (8, 4, 512)),
        ((8, None, None), 16, (8, 1, 128)),
        ((None, None, 64), 2, (16, 2, 64)),
        ((None, None, 6), 2, (3, 1, 6)),
        ((8, 4, 500), 16, None),
        ((8, None, 500), 16, None),
        ((None, None, 500), 16, None),
        ((None, 64, 32), 1, None),
        ((64, None, 32), 1, None),
    ],
    ids=str,
)
def test_worked_examples(given, world_size, expected):
    assert solve(*given, world_size) == expected


@given(maybe, maybe, maybe, st.integers(1, 64))
def test_a_solution_keeps_what_was_given_and_multiplies_out(micro, accumulation, total, world_size):
    assume(micro is not None or total is not None)
    batch = solve(micro, accumulation, total, world_size)
    if batch is None:
        return
    assert min(batch) >= 1
    assert batch.micro * batch.accumulation * world_size == batch.total
    assert all(was in (None, now) for was, now in zip((micro, accumulation, total), batch, strict=True))


@given(maybe, maybe, sizes, st.integers(1, 16))
def test_no_solution_means_that_there_is_none(micro, accumulation, total, world_size):
    every = [
        Batch(m, a, m * a * world_size)
        for m, a in product(range(1, total + 1), repeat=2)
        if m * a * world_size == total and micro in (None, m) and accumulation in (None, a)
    ]
    solved = solve(micro, accumulation, total, world_size)
    assert (solved in every) if every else (solved is None)


def distance(batch, given):
    pairs = [(now, was) for now, was in zip(batch, given, strict=True) if was is not None]
    return sum(now != was for now, was in pairs), sum(abs(math.log(now / was)) for now, was in pairs)


@given(st.none() | st.integers(1, 12), st.none() | st.integers(1, 12), st.integers(1, 60), st.integers(1, 9))
def test_suggestions_are_valid_different_and_the_first_is_the_nearest_of_all(micro, accumulation, total, world_size):
    given = (micro, accumulation, total)
    assume(solve(*given, world_size) is None)
    found = nearest_valid(*given, world_size)
    assert len(set(found)) == 3
    assert all(min(b) >= 1 and b.micro * b.accumulation * world_size == b.total for b in found)
    every = [Batch(m, a, m * a * world_size) for m, a in product(range(1, 130), repeat=2)]
    best = min(distance(batch, given) for batch in every)
    assert distance(found[0], given) == pytest.approx(best)


def test_the_largest_numbers_take_no_time():
    found = nearest_valid(2**31 - 1, 2**31 - 1, 2**31 - 1, 7)
    assert len(found) == 3
