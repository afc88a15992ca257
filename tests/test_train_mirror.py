"""--mirror: a second place that has every checkpoint soon after the first, and stands in when the first is damaged."""

import shutil
import threading

import pytest
from checkpoint_common import curve, flip_a_bit, folder, resume, shard

from megagpt.errors import StorageError
from megagpt.train import faults, manifest, mirror


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """The run folder and the mirror of a finished run."""
    run_dir, second = tmp_path_factory.mktemp("first") / "run", tmp_path_factory.mktemp("second") / "run"
    code, output = resume(run_dir, max_steps=4, keep_last=2, mirror=second)
    assert code == 0, output
    return run_dir, second


def content(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.suffix != ".py"}


def test_at_the_end_the_mirror_has_the_newest_checkpoints_byte_for_byte(mirrored):
    run_dir, second = mirrored
    assert manifest.step_of(manifest.folders(second / "checkpoints")[0]) == 4
    assert content(folder(second, 4)) == content(folder(run_dir, 4))
    assert len(manifest.folders(second / "checkpoints")) >= 2
    assert all(manifest.problem(f) is None for f in manifest.folders(second / "checkpoints"))
    assert not list((second / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("fate", ["damaged", "gone"])
def test_a_run_goes_on_from_the_mirror_when_the_first_place_is(mirrored, tmp_path, fate):
    run_dir, second = tmp_path / "run", tmp_path / "second"
    for original, copied in zip(mirrored, (run_dir, second), strict=True):
        shutil.copytree(original, copied)
    if fate == "gone":
        shutil.rmtree(run_dir / "checkpoints")
    else:
        for path in manifest.folders(run_dir / "checkpoints"):
            flip_a_bit(shard(run_dir, manifest.step_of(path)))
    code, output = resume(run_dir, max_steps=6, keep_last=2, mirror=second)
    assert code == 0, output
    assert f"copied global_step4 back from {second}" in output
    assert (fate == "damaged") == ("skipped checkpoint global_step4: zero_pp_rank_1" in output)
    assert "step 4 of 6" in output
    assert [r["step"] for r in curve(run_dir) if "loss" in r][-3:] == [4, 5, 6]
    assert manifest.problem(folder(second, 6)) is None


def test_a_damaged_mirror_is_named_and_done_without(mirrored, tmp_path):
    run_dir, second = tmp_path / "run", tmp_path / "second"
    for original, copied in zip(mirrored, (run_dir, second), strict=True):
        shutil.copytree(original, copied)
    flip_a_bit(shard(run_dir, 4))
    flip_a_bit(shard(second, 4))
    code, output = resume(run_dir, max_steps=5, keep_last=2, mirror=second, save_interval=0)
    assert code == 0, output
    assert f"skipped checkpoint global_step4 of {second}" in output
    assert "step 3 of 5" in output


def test_a_mirror_that_fails_is_told_and_costs_the_run_nothing(tmp_path):
    env = {faults.VARIABLE: "mirror_file_copied::0:ENOSPC"}
    code, output = resume(tmp_path / "run", max_steps=3, mirror=tmp_path / "second", env=env)
    assert code == 0, output
    assert "WARNING: the mirror is behind, training goes on: cannot copy" in output
    assert "No space left on device" in output
    assert manifest.problem(folder(tmp_path / "run", 3)) is None
    assert not list((tmp_path / "second" / "checkpoints").iterdir()), "nothing half-copied is left"


def test_a_step_does_not_wait_for_the_copy_and_what_is_being_copied_stays(mirrored, tmp_path, monkeypatch):
    """The copy is held up until the test lets it go on."""
    go_on = threading.Event()
    monkeypatch.setattr(faults, "point", lambda place: go_on.wait(20) if place == "mirror_file_copied" else None)
    copies = mirror.Mirror(tmp_path / "checkpoints", keep_last=2)
    for step in (3, 4):
        copies.start(folder(mirrored[0], step), set())
    assert copies.in_use() >= {4}, "what waits replaces what waited, or nothing did"
    assert not manifest.folders(tmp_path / "checkpoints")
    go_on.set()
    copies.finish()
    assert copies.in_use() == set()
    assert manifest.problem(tmp_path / "checkpoints" / "global_step4") is None


def test_damage_is_not_copied(mirrored, tmp_path):
    shutil.copytree(mirrored[0], tmp_path / "run")
    flip_a_bit(shard(tmp_path / "run", 4))
    with pytest.raises(StorageError, match=r"optim_states.pt is damaged"):
        mirror.copy(folder(tmp_path / "run", 4), tmp_path / "second")
    assert not list((tmp_path / "second").iterdir())
