"""Runs of several phases: what each trains, what it leaves alone, and how they are resumed."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from distributed import finetune, run_ranks
from finetune_common import ds_config, folder, pretrained, write_csv
from safetensors.torch import load_file
from test_finetune_run import curve

from megagpt.finetune import driver, weights
from megagpt.finetune.recipes import group_of

BATCH = ["--global_batch_size", 8, "--micro_batch_size", 4, "--log_interval", 1]


def arguments(home: Path, stage: int, precision: str, *more) -> list:
    train, valid = write_csv(folder() / "my.csv", 44, 0), write_csv(folder() / "dev.csv", 21, 1)
    files = ["--train", train, "--valid", valid, "--init_from", pretrained("pre"), "--run_dir", home / "run"]
    return ["--ds_config", ds_config(home, stage, precision), *files, "--recipe", "ulmfit", "--lr", 1e-3, *BATCH, *more]


def recorded(argv: list) -> list[dict]:
    """Run ``finetune.py`` on this rank; of every phase its groups and which parameters' bytes differ after it."""
    phases = []
    whole = driver.weights.digests

    def digests(module, wanted):
        # Called before and after a phase: note all parameters, then answer as always.
        everything = whole(module, lambda _: True)
        if phases and "after" not in phases[-1]:
            phases[-1]["after"] = everything
        else:
            phases.append({"objective": module.objective, "before": everything})
            phases[-1]["trainable"] = [n for n, p in module.named_parameters() if p.requires_grad]
        return whole(module, wanted)

    driver.weights.digests = digests
    from megagpt.finetune.main import main

    code = main([str(a) for a in argv])
    assert code == 0
    return phases


EXPECTED = [
    ("lm", {"embeddings", "lower", "middle", "upper"}),
    ("task", {"head"}),
    ("task", {"head", "upper"}),
    ("task", {"head", "upper", "middle"}),
    ("task", {"head", "upper", "middle", "lower"}),
    ("task", {"head", "upper", "middle", "lower", "embeddings"}),
]


@pytest.mark.parametrize(
    ("stage", "precision", "ranks"), [(0, "fp32", 1), (0, "bf16", 1), (1, "bf16", 2), (2, "fp32", 1), (3, "bf16", 2)]
)
def test_every_phase_changes_what_it_trains_and_not_one_bit_of_the_rest(tmp_path, stage, precision, ranks):
    results = run_ranks(recorded, ranks, arguments(tmp_path, stage, precision), timeout=240)
    for phases, _ in results:
        assert [p["objective"] for p in phases] == [objective for objective, _ in EXPECTED]
        for phase, (objective, groups) in zip(phases, EXPECTED, strict=True):
            members = {name for name in phase["before"] if group_of(name, 3, objective) in groups}
            assert set(phase["trainable"]) == members
            changed = {name for name, digest in phase["before"].items() if phase["after"][name] != digest}
            assert changed <= members
            assert len(changed) > 0.5 * len(members)
        # What a phase leaves the next one begins with, but for 16-bit rounding of what it has just trained.
        for before, after in itertools.pairwise(phases):
            frozen = set(before["before"]) - set(before["trainable"])
            if precision == "fp32":
                frozen = set(before["before"])
            assert {n: before["after"][n] for n in frozen} == {n: after["before"][n] for n in frozen}


def stopped(argv: list, step: int) -> int:
    """``finetune.py`` on this rank, ended as by a crash when it is about to make the update after ``step``."""
    advance = driver.Loop.advance

    def until(loop):
        if loop.state.step == step:
            raise RuntimeError("stopped by the test")
        advance(loop)

    driver.Loop.advance = until
    from megagpt.finetune.main import main

    return main([str(a) for a in argv])


@pytest.mark.timeout(900)  # five runs of two ranks, with an engine built for each of six phases
def test_an_interrupted_run_of_several_phases_repeats_the_uninterrupted_one(tmp_path):
    """Stopped in the middle of an epoch, and when a phase is over and the next one has not made a step."""
    more = ["--save_interval", 2]
    whole, home = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    home.mkdir()
    assert finetune(arguments(whole, 1, "fp32", *more), 2)[0] == [0, 0]
    records = curve(whole / "run")
    last = max(r["step"] for r in records)
    ends = [r["step"] for r in records if "valid/valid/loss" in r]
    for step in (ends[0] + 3, ends[2]):
        assert [code for code, _ in run_ranks(stopped, 2, arguments(home, 1, "fp32", *more), step)] == [1, 1]
    codes, output = finetune(arguments(home, 1, "fp32", *more), 2)
    assert codes == [0, 0], output
    assert f"step {ends[2]} of {last}" in output
    assert curve(home / "run") == records
    ours, theirs = (load_file(h / "run" / weights.MODEL) for h in (home, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    summaries = [json.loads((h / "run" / "summary.json").read_text()) for h in (home, whole)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    # A run that is over says what came out once more and trains nothing.
    before = (home / "run" / weights.MODEL).read_bytes()
    assert finetune(arguments(home, 1, "fp32", *more), 2)[0] == [0, 0]
    assert curve(home / "run") == records
    assert (home / "run" / weights.MODEL).read_bytes() == before
