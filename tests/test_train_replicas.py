"""Ranks that no longer hold the same model are found."""

import os

import pytest
import torch
from checkpoint_common import arguments
from fork_server import Job, train_main

from megagpt.train.replicas import fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_flipped_bit_changes_the_fingerprint(dtype):
    model = torch.nn.Linear(3, 5, dtype=dtype)
    before = fingerprints(model.parameters())
    size = model.weight.element_size()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    for bit in range(8 * size):
        flipped = model.weight.detach().view(integers)[4, 1]
        mask = -(1 << bit) if bit == 8 * size - 1 else 1 << bit
        flipped ^= mask
        after = fingerprints(model.parameters())
        assert (before != after).tolist() == [True, False]
        flipped ^= mask
    assert torch.equal(fingerprints(model.parameters()), before)


def flipping(argv):
    """``train.py`` in which a parameter of rank 1 changes after step 7, in bf16 its float32 copy."""
    from megagpt.train.loop import Loop

    after = Loop._after_step

    def flip(self, loss):
        if self.state.step == 7 and os.environ["RANK"] == "1":
            copies = getattr(self.engine.optimizer, "fp32_groups", None)
            parameter = copies[0][0] if copies else next(self.engine.module.parameters())
            parameter.data[3] += 0.5
        after(self, loss)

    Loop._after_step = flip
    return train_main(argv)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_parameter_that_differs_is_found_by_the_next_check(precision, tmp_path):
    flags = {"stage": 0, "precision": precision, "max_steps": 100, "compare_ranks_interval": 4, "save_interval": 100}
    with Job(flipping, [str(w) for w in arguments(tmp_path / "run", **flags)]) as job:
        assert job.wait() == [6, 6], job.output()
        assert "error: step 8: " in job.output(0)
        assert "differ between ranks (rank 0 on " in job.output(0)
