"""Schedules against the golden values of the papers and of the authors' code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import ConfigError
from megagpt.train.schedule import SCHEDULES, Schedule, stlr, warmup_constant, warmup_cosine_reference, warmup_linear


@pytest.mark.parametrize(("t", "value"), [(0, 0.0), (1, 0.4995), (2, 0.998), (3, 0.997), (500, 0.5)])
def test_linear_golden_values(t, value):
    assert warmup_linear(t, 1000, 0.002) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("t", "rate"), [(1, 1.25e-7), (1000, 1.25e-4), (2000, 2.5e-4), (51_000, 1.25e-4), (100_000, 0)]
)
def test_cosine_golden_values(t, rate):
    assert 2.5e-4 * Schedule("warmup_cosine", 100_000, 2000).multiplier(t) == pytest.approx(rate, abs=1e-15)


@pytest.mark.parametrize(
    ("total", "t", "rate"),
    [
        (100, 0, 0.0003125),
        (100, 1, 0.00128125),
        (100, 5, 0.00515625),
        (100, 10, 0.01),
        (100, 50, 0.00569444),
        (100, 99, 0.00042014),
        (97, 9, 0.01),
        (97, 96, 0.00042259),
    ],
)
def test_stlr_golden_values(total, t, rate):
    assert 0.01 * stlr(t, total) == pytest.approx(rate, abs=5e-9)


@given(st.integers(1, 3000), st.data())
def test_stlr_never_leaves_its_band(total, data):
    t = data.draw(st.integers(0, total))
    assert 1 / 32 - 1e-12 <= stlr(t, total) <= 1.0 + 1e-12


def test_reference_cosine_jumps_where_the_warm_up_ends_and_constant_does_not_decay():
    assert warmup_cosine_reference(10, 100, 0.1) == pytest.approx(1.0)
    assert warmup_cosine_reference(11, 100, 0.1) == pytest.approx(0.97044, abs=1e-5)
    assert warmup_constant(99, 100, 0.1) == 1.0


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 500), st.data())
def test_every_schedule_stays_between_zero_and_one(name, total, data):
    warmup = data.draw(st.integers(0, total))
    t = data.draw(st.integers(0, total + 5))
    floor = data.draw(st.floats(0, 1))
    assert 0.0 <= Schedule(name, total, warmup, floor).multiplier(t) <= 1.0 + 1e-12


def test_min_lr_is_reached_at_the_end_and_the_peak_is_untouched():
    schedule = Schedule("warmup_cosine", 100, 10, floor=0.1)
    assert schedule.multiplier(10) == pytest.approx(1.0)
    assert schedule.multiplier(100) == pytest.approx(0.1)
    assert schedule.multiplier(5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("warmup_cosin", 10), "did you mean 'warmup_cosine'"),
        (("warmup_cosine", 0), "at least one update"),
        (("warmup_cosine", 10, 11), "--warmup_steps 11 does not fit"),
        (("warmup_cosine", 10, 1, 1.5), "--min_lr"),
    ],
)
def test_impossible_schedules_are_refused_in_words(arguments, words):
    with pytest.raises(ConfigError, match=words):
        Schedule(*arguments)
