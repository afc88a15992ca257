"""Runs of several phases: what each trains, what it leaves alone, and how they are resumed."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from finetune_common import ds_config, folder, plan_of, pretrained, train_all, write_csv
from safetensors.torch import load_file
from test_finetune_run import curve

from megagpt.finetune import driver, weights
from megagpt.finetune.recipes import group_of

BATCH = ["--global_batch_size", 8, "--micro_batch_size", 4, "--log_interval", 1]


def arguments(home: Path, stage: int, precision: str, *more) -> list:
    train, valid = write_csv(folder() / "my.csv", 44, 0), write_csv(folder() / "dev.csv", 21, 1)
    files = ["--train", train, "--valid", valid, "--init_from", pretrained("pre"), "--run_dir", home / "run"]
    return ["--ds_config", ds_config(home, stage, precision), *files, *BATCH, *more]


def recorded(cases: list[list]) -> list[list[dict]]:
    """Make each run on this rank; of each run's phases the groups and which parameters' bytes differ after it."""
    return [_recorded(argv) for argv in cases]


def _recorded(argv: list) -> list[dict]:
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
    try:
        train_all([argv])
    finally:
        driver.weights.digests = whole
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
    ("ranks", "settings"), [(1, [(0, "fp32"), (0, "bf16"), (2, "fp32")]), (2, [(1, "bf16"), (3, "bf16")])], ids=str
)
def test_every_phase_changes_what_it_trains_and_not_one_bit_of_the_rest(tmp_path, ranks, settings):
    cases = []
    for stage, precision in settings:
        home = tmp_path / f"{stage}-{precision}"
        home.mkdir()
        cases.append(arguments(home, stage, precision, "--recipe", "ulmfit", "--lr", 1e-3))
    for of_rank, _ in run_ranks(recorded, ranks, cases, timeout=240):
        for (_, precision), phases in zip(settings, of_rank, strict=True):
            check_phases(phases, precision)


def check_phases(phases: list[dict], precision: str) -> None:
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


def whole_and_stopped(whole: list, stopped: list, steps: list[int]) -> list[str]:
    """On this rank a whole run, then one that ends as by a crash when it is about to make the update after a step."""
    train_all([whole])
    found = []
    advance = driver.Loop.advance
    for step in steps:

        def until(loop, step=step):
            if loop.state.step == step:
                raise RuntimeError(f"stopped before update {step + 1}")
            advance(loop)

        driver.Loop.advance = until
        try:
            train_all([stopped])
        except RuntimeError as error:
            found.append(str(error))
    return found


def twice(argv: list) -> list[tuple]:
    """Make a run on this rank and start it again; after each its weights and its curve."""
    found = []
    for _ in range(2):
        train_all([argv])
        run_dir = plan_of(argv).run_dir
        found.append((hashlib.sha256((run_dir / weights.MODEL).read_bytes()).hexdigest(), curve(run_dir)))
    return found


def test_an_interrupted_run_of_several_phases_repeats_the_uninterrupted_one(tmp_path):
    """Stopped in the middle of an epoch, and when a phase is over and the next one has not made a step."""
    recipe = tmp_path / "recipe.json"
    phases = [
        {"name": "text", "objective": "lm", "groups": ["middle", "upper"], "lr": 1e-3},
        {"name": "head", "groups": ["head"], "lr": 1e-2, "schedule": "stlr"},
        {"name": "all", "lr": 1e-3, "discrimination": 2.6, "lm_coef": 0.5},
    ]
    recipe.write_text(json.dumps({"head": "pooled_mlp", "phases": phases}))
    homes = [tmp_path / "whole", tmp_path / "stopped"]
    for home in homes:
        home.mkdir()
    whole, stopped = (arguments(home, 1, "fp32", "--recipe", recipe, "--save_interval", 2) for home in homes)
    steps = 44 // 8  # of an epoch of the task
    first, second, last = (phase.end for phase in plan_of(whole).phases)
    assert (second - first, last - second) == (steps, steps)
    for said, _ in run_ranks(whole_and_stopped, 2, whole, stopped, [first + 3, second]):
        assert said == [f"stopped before update {first + 4}", f"stopped before update {second + 1}"]
    ((once, again), output), _ = run_ranks(twice, 2, stopped)
    assert f"step {second} of {last}" in output
    records = curve(homes[0] / "run")
    assert max(r["step"] for r in records) == last
    assert curve(homes[1] / "run") == records
    ours, theirs = (load_file(home / "run" / weights.MODEL) for home in homes)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    summaries = [json.loads((home / "run" / "summary.json").read_text()) for home in homes]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert again == once  # a run that is over says what came out once more and trains nothing
