"""--async_save: training waits for a copy in memory, and what is written is what a save at once would have written."""

import json
import re

import torch
from checkpoint_common import curve, folder, resume, tensors

from megagpt.train import checkpoint, faults, manifest
from megagpt.train.writer import copy_to_cpu


def test_what_is_saved_in_the_background_is_the_state_of_its_step(finished, tmp_path):
    """Every file takes a second to write, and steps a fraction of that."""
    run_dir = tmp_path / "run"
    flags = {"max_steps": 4, "save_interval": 2, "env": {faults.VARIABLE: "file_written::0:sleep1.0"}}
    code, output = resume(run_dir, "--async_save", **flags)
    assert code == 0, output
    waited = [float(seconds) for seconds in re.findall(r"in the background; training waited ([0-9.]+) s", output)]
    assert len(waited) == 1, "the last one is waited for"
    assert waited[0] < 1.0
    assert output.index("in the background") < output.index("iteration        3/")
    assert curve(run_dir) == curve(finished)
    for step in (2, 4):
        ours, theirs = tensors(folder(run_dir, step)), tensors(folder(finished, step))
        assert ours.keys() == theirs.keys()
        assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())
        assert checkpoint.read_state(folder(run_dir, step)) == checkpoint.read_state(folder(finished, step))
        assert manifest.problem(folder(run_dir, step)) is None


def test_a_disk_that_fails_in_the_background_is_told_and_in_the_end_ends_the_run(tmp_path):
    code, output = resume(tmp_path / "run", "--async_save", env={faults.VARIABLE: "file_synced:1:0:ENOSPC"})
    assert code == 7, output
    assert output.count("failed, going on: rank 1: cannot write the checkpoint") == 2
    assert "No space left on device" in output.splitlines()[-1]
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


def test_a_copy_shares_memory_as_the_original_does_and_none_with_it():
    flat = torch.arange(12.0)
    original = {"a": flat[:4].view(2, 2), "b": [flat[4:], (flat, 3)], "c": torch.empty(0), "d": "text"}
    copied = copy_to_cpu(original, {})
    flat.zero_()
    assert copied["a"].tolist() == [[0, 1], [2, 3]]
    assert copied["b"][0].tolist() == list(range(4, 12))
    assert copied["d"] == "text"
    copied["b"][1][0][0] = 9
    assert copied["a"][0, 0] == 9
    assert json.dumps(copied["c"].tolist()) == "[]"
