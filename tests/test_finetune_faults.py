"""Fine-tuning that is saved in the background, mirrored, resumed on another number of ranks, or told to stop at NaN."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_common import folder, tensors
from distributed import finetune, run_ranks
from finetune_common import ds_config, pretrained, train_all, write_csv
from finetune_common import folder as home
from test_finetune_run import assert_same_curve, curve

from megagpt.train import checkpoint, manifest

STAGES = (0, 1, 2, 3)
RECIPE = {"phases": [{"name": "all", "epochs": 3, "lr": 1e-2, "discrimination": 2.6, "schedule": "warmup_constant"}]}


def arguments(run_dir: Path, stage: int, *more) -> list:
    """A run of six steps of eight examples, saved at each, with groups of parameters at five rates."""
    recipe = home() / "rates.json"
    recipe.write_text(json.dumps(RECIPE))
    train, valid = write_csv(home() / "few.csv", 16, 0), write_csv(home() / "fewer.csv", 6, 1)
    files = ["--train", train, "--valid", valid, "--recipe", recipe, "--init_from", pretrained()]
    batch = ["--global_batch_size", 8, "--micro_batch_size", 2, "--dropout", 0, "--head_dropout", 0]
    when = ["--save_interval", 1, "--keep_last", 9, "--log_interval", 1, "--run_dir", run_dir]
    return ["--ds_config", ds_config(home(), stage), *files, *batch, *when, *more]


def forget_after(run_dir: Path, step: int) -> None:
    for path in manifest.folders(run_dir / "checkpoints"):
        if manifest.step_of(path) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Path:
    """Runs of two ranks: whole-0 to whole-3, in-background and mirrored, whose mirror is second."""
    top = tmp_path_factory.mktemp("faults")
    cases = [arguments(top / f"whole-{stage}", stage) for stage in STAGES]
    cases.append(arguments(top / "in-background", 1, "--async_save"))
    cases.append(arguments(top / "mirrored", 1, "--mirror", top / "second"))
    run_ranks(train_all, 2, cases)
    return top


@pytest.fixture(scope="module")
def changed(top) -> Path:
    """Copies that went on from step 2 on one rank, to the end, and from its step 4 on two; one that lost its folder."""
    for stage in STAGES:
        shutil.copytree(top / f"whole-{stage}", top / f"changed-{stage}")
        forget_after(top / f"changed-{stage}", 2)
    run_ranks(train_all, 1, [arguments(top / f"changed-{stage}", stage) for stage in STAGES])
    for stage in STAGES:
        shutil.copytree(top / f"changed-{stage}", top / f"on-one-{stage}")
        forget_after(top / f"changed-{stage}", 4)
    shutil.copytree(top / "mirrored", top / "restored")
    shutil.rmtree(top / "restored" / "checkpoints")
    shutil.copytree(top / "second", top / "second-restored")
    forget_after(top / "second-restored", 5)
    cases = [arguments(top / f"changed-{stage}", stage) for stage in STAGES]
    run_ranks(train_all, 2, [*cases, arguments(top / "restored", 1, "--mirror", top / "second-restored")])
    return top


def test_what_is_saved_in_the_background_is_what_is_saved_at_once(top):
    assert curve(top / "in-background") == curve(top / "whole-1")
    for step in (3, 6):
        ours, theirs = tensors(folder(top / "in-background", step)), tensors(folder(top / "whole-1", step))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert checkpoint.read_state(folder(top / "in-background", step)) == checkpoint.read_state(
            folder(top / "whole-1", step)
        )


def test_a_mirror_has_the_newest_checkpoint_byte_for_byte(top):
    ours, second = folder(top / "mirrored", 6), folder(top / "second", 6)
    assert manifest.problem(second) is None
    for path in ours.iterdir():
        if path.is_file() and path.suffix != ".py":
            assert (second / path.name).read_bytes() == path.read_bytes()


def test_a_run_goes_on_from_the_mirror_when_its_folder_is_lost(changed):
    assert curve(changed / "restored") == curve(changed / "mirrored")
    ours, theirs = tensors(folder(changed / "restored", 6)), tensors(folder(changed / "mirrored", 6))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_then_one_then_two_compute_what_two_would_have(changed, stage):
    whole = curve(changed / f"whole-{stage}")
    assert len(set(next(r["lr"] for r in whole if "lr" in r).values())) == 5, "groups with rates of their own"
    for run in (f"on-one-{stage}", f"changed-{stage}"):
        assert_same_curve(curve(changed / run), whole, 1e-4)
    starts = json.loads((changed / f"changed-{stage}" / "run.json").read_text())["starts"]
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 2), (2, 1), (4, 2)]


def test_fine_tuning_stops_at_the_first_nan_where_that_is_asked_for(tmp_path):
    """A rate beyond all reason makes the weights infinite."""
    codes, output = finetune([*arguments(tmp_path / "run", 1, "--on_nan", "stop", "--weight_decay", 1e17)], 2)
    assert codes == [6, 6], output
    assert "and --on_nan is stop" in output
    told = json.loads((tmp_path / "run" / "numeric_stop.json").read_text())
    assert all(rank["first_not_finite"] for rank in told["ranks"])
