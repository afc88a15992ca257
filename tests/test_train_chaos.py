"""Kills at every named place of a save, and at random moments: tests/chaos.py over a few kinds of runs."""

import random

import pytest
from chaos import PLACES, RANDOM, Tally, chain

from megagpt.train import faults

_PLACES_ONCE = [(place, i % 2) for i, place in enumerate(faults.EVERY_RANK)] + [(place, 0) for place in faults.RANK_0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.mark.parametrize(
    ("i", "stage", "precision"), [(0, 0, "bf16"), (1, 1, "fp32"), (2, 2, "fp16"), (3, 3, "bf16")], ids=str
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(folder, i, stage, precision):
    tally = Tally()
    kills = [*_PLACES_ONCE[i::4], RANDOM, RANDOM]
    chain(folder, stage, precision, kills, random.Random(i), tally, asynchronous=i % 2 == 1)
    assert tally.kills.total() >= len(kills) - 2
    # A step is saved before the next begins, or the next but one where it is saved in the background.
    assert max(tally.lost) <= 1 + i % 2
    assert max(tally.ended) < 15, "seconds from a rank's death to the end of the job"


def test_every_place_is_in_the_code_and_no_other():
    import re
    from pathlib import Path

    package = Path(faults.__file__).parent
    found = set()
    for path in package.glob("*.py"):
        found |= set(re.findall(r'faults\.point\("(\w+)"\)', path.read_text()))
    assert found == {place for place, _ in PLACES} | set(faults.MIRROR)
    assert len(found) >= 11
