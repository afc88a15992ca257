"""Kills at every named place of a save, and at random moments: tests/chaos.py over a few kinds of runs."""

import random
from collections import deque
from pathlib import Path

import pytest
from chaos import PLACES, SETUP, TRAINING, Tally, chain

from megagpt.train import faults

_PLACES_ONCE = [(place, i % 2) for i, place in enumerate(faults.EVERY_RANK)] + [(place, 0) for place in faults.RANK_0]
_AT_RANDOM = [SETUP] * 4 + [TRAINING] * 46


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture
def nothing_left():
    """Killed jobs leave no shared memory: DeepSpeed's operation for CPUs keeps 69 MB a rank there for ever."""
    before = set(Path("/dev/shm").glob("*"))
    yield
    assert not {path for path in set(Path("/dev/shm").glob("*")) - before if "deepspeed" in path.name}


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("i", "stage", "precision"), [(0, 0, "bf16"), (1, 1, "fp32"), (2, 2, "fp16"), (3, 3, "bf16")], ids=str
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(folder, i, stage, precision):
    rng, tally = random.Random(i), Tally()
    planned = [*_PLACES_ONCE[i::4], *_AT_RANDOM[i::4]]
    rng.shuffle(planned)
    kills = deque(planned)
    while kills:
        chain(folder, stage, precision, kills, rng, tally, asynchronous=i % 2 == 1)
    assert tally.kills.total() == len(planned)
    # A step is saved before the next begins, or the next but one where it is saved in the background.
    assert max(tally.lost) <= 1 + i % 2
    assert max(tally.ended) < 15, "seconds from a rank's death to the end of the job"


def test_every_place_is_in_the_code_and_no_other():
    import re

    package = Path(faults.__file__).parent
    found = set()
    for path in package.glob("*.py"):
        found |= set(re.findall(r'faults\.point\("(\w+)"\)', path.read_text()))
    assert found == {place for place, _ in PLACES} | set(faults.MIRROR)
    assert len(found) >= 11
