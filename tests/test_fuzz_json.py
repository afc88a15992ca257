"""What a checkpoint says of itself: whatever a place in it holds, there is one clear error or a right result."""

import json
from contextlib import suppress

import pytest
from fuzz_targets import damaged
from hypothesis import HealthCheck, given, settings

from megagpt.errors import CheckpointError
from megagpt.train import manifest

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def saved(tmp_path):
    """A committed checkpoint without tensors."""
    tmp = tmp_path / manifest.tmp_name(3)
    tmp.mkdir()
    state = {"step": 3, "samples": 12, "tokens": 96, "model": {"d_model": 8}, "data": {"seed": 1}}
    (tmp / manifest.STATE).write_text(json.dumps(state))
    header = {"step": 3, "world_size": 2, "zero_stage": 1, "precision": "fp32", "model": {"d_model": 8}, "data": {}}
    manifest.commit(tmp, tmp_path / "global_step3", [manifest.hash_file(tmp, manifest.STATE)], header)
    return tmp_path / "global_step3"


def test_a_manifest(saved):
    good = (saved / manifest.MANIFEST).read_bytes()

    @QUICK
    @given(damaged(json.loads(good)))
    def check(content):
        (saved / manifest.MANIFEST).write_bytes(content)
        assert manifest.problem(saved) is not None
        assert not manifest.seems_whole(saved)

    check()
    (saved / manifest.MANIFEST).write_bytes(good)
    assert manifest.problem(saved) is None


def test_what_a_checkpoint_says_of_itself(saved):
    @QUICK
    @given(damaged(json.loads((saved / manifest.STATE).read_text())))
    def check(content):
        (saved / manifest.STATE).write_bytes(content)
        with suppress(CheckpointError):
            assert manifest.read_source(saved.parent).model is not None

    check()
