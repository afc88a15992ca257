"""Damage to checkpoints that is found before DeepSpeed sees them, errors of the disk, and code in place of tensors."""

import errno
import json
import os
import pickle
import shutil

import pytest
import torch
from checkpoint_common import arguments, folder, resume, shard
from corruption import survey
from distributed import run_ranks, train_main
from fork_server import Job

from megagpt.errors import CheckpointError
from megagpt.train import faults, manifest, retention, weights


def test_500_random_corruptions_are_found_named_and_passed_over(run_dir):
    assert survey(run_dir, 500).total() == 500


def _spoil_all(root):
    for path in manifest.folders(root):
        (path / manifest.STATE).write_text("{}")


def _nothing(root):
    pass


HINTS = {
    "missing": lambda latest: latest.unlink(),
    "empty": lambda latest: latest.write_text(""),
    "of a step that is not there": lambda latest: latest.write_text("global_step99"),
    "outside": lambda latest: latest.write_text("../../outside"),
    "no text": lambda latest: latest.write_bytes(b"\xff\0" * 99),
    "a folder": lambda latest: (latest.unlink(), latest.mkdir()),
    "a link to outside": lambda latest: (latest.unlink(), latest.symlink_to("/etc/hostname")),
}


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize("spoil", [_nothing, _spoil_all], ids=["good", "damaged"])
def test_whatever_latest_is_the_newest_intact_checkpoint_is_taken_or_none(run_dir, hint, spoil):
    root = run_dir / "checkpoints"
    HINTS[hint](root / "latest")
    spoil(root)
    if spoil is _nothing:
        assert manifest.newest_intact(root) == (folder(run_dir, 4), [])
        return
    with pytest.raises(CheckpointError, match=r"no checkpoint under .* is intact") as caught:
        manifest.newest_intact(root)
    assert str(caught.value).count("skipped checkpoint") == 4
    assert caught.value.exit_code == 3


def test_a_folder_that_lost_its_checkpoints_is_no_fresh_start(run_dir):
    for path in manifest.folders(run_dir / "checkpoints"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="has had checkpoints"):
        manifest.newest_intact(run_dir / "checkpoints")


def test_a_foreign_shard_beside_the_listed_ones_is_noticed(run_dir):
    """DeepSpeed and its converters take shards by the pattern of their names."""
    shutil.copy(shard(run_dir, 3), folder(run_dir, 4) / "zero_pp_rank_2_mp_rank_00_optim_states.pt")
    assert "zero_pp_rank_2_mp_rank_00_optim_states.pt, of which" in manifest.problem(folder(run_dir, 4))


def test_a_manifest_of_the_former_format_is_read(run_dir):
    path = folder(run_dir, 4) / manifest.MANIFEST
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps({**content, "format": 1}))
    assert manifest.problem(folder(run_dir, 4)) is None


def test_retention_does_not_count_a_checkpoint_that_lacks_a_byte(run_dir):
    path = shard(run_dir, 4)
    path.write_bytes(path.read_bytes()[:-1])
    assert retention.prune(run_dir / "checkpoints", keep_last=2, keep=set()) == [1]
    assert [manifest.step_of(f) for f in manifest.folders(run_dir / "checkpoints")] == [4, 3, 2]


def test_what_dead_runs_left_goes_and_what_is_not_ours_stays(tmp_path):
    for name in (".tmp-global_step3", ".tmp-old-global_step2", ".tmp-mine", "global_step7"):
        (tmp_path / name).mkdir()
    (tmp_path / ".latest.tmp-99").write_text("global_")
    (tmp_path / ".tmp-global_step9").symlink_to(tmp_path / "global_step7")
    retention.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-mine", "global_step7"]


# in whole runs of two ranks --------------------------------------------------------------------------------------


def test_a_save_that_fails_once_is_tried_again(tmp_path):
    code, output = resume(tmp_path / "run", max_steps=2, env={faults.VARIABLE: "file_synced:1:3:ENOSPC"})
    assert code == 0, output
    assert output.count("failed and is tried once more: rank 1: cannot write the checkpoint") == 1
    assert "No space left on device" in output
    root = tmp_path / "run" / "checkpoints"
    assert [manifest.problem(f) for f in manifest.folders(root)] == [None, None]


@pytest.mark.parametrize(
    "fault", ["file_opened:1:0:EIO", "file_written:0:0:ENOSPC", "state_written::0:EROFS", "manifest_written::0:EDQUOT"]
)
def test_a_disk_that_goes_on_failing_is_named_ends_the_run_and_costs_no_checkpoint(run_dir, fault):
    root = run_dir / "checkpoints"
    before = {path: path.read_bytes() for path in root.glob("*/*")}
    code, output = resume(run_dir, max_steps=9, env={faults.VARIABLE: fault})
    assert code == 7, output
    assert output.count("failed, going on: ") == 2, "the third in a row is the end"
    assert output.count("error: ") == 1
    assert os.strerror(getattr(errno, fault.rpartition(":")[2])) in output.splitlines()[-1]
    assert "step 7" in output
    assert {path: path.read_bytes() for path in root.glob("*/*")} == before
    assert not list(root.glob(".tmp*")), "a partial checkpoint would eat the space that is missing"


def test_a_folder_of_checkpoints_that_vanishes_in_the_run_is_made_again(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    flags = [str(word) for word in arguments(tmp_path / "run", max_steps=6)]
    with Job(train_main, flags, env={faults.VARIABLE: "save_begun:0:3:sleep2"}) as job:
        job.wait_for("global_step2 in", rank=0)
        shutil.rmtree(root)
        assert job.wait() == [0, 0], job.output()
    assert [manifest.step_of(path) for path in manifest.folders(root)] == [6, 5, 4, 3]
    assert manifest.problem(folder(tmp_path / "run", 6)) is None


class _Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (os.mkdir, (self.marker,))


def _poison(run_dir, pattern, marker) -> None:
    """Put code into files of the newest checkpoint; its manifest agrees, as that of a stranger's would."""
    content = manifest.read(folder(run_dir, 4))
    for path in folder(run_dir, 4).glob(pattern):
        torch.save({"module": _Evil(marker), "torch": _Evil(marker)}, path)
        entry = manifest.hash_file(folder(run_dir, 4), path.name)
        content["files"][path.name] = {"size": entry.size, "sha256": entry.sha256}
    manifest.write(folder(run_dir, 4), content)


@pytest.mark.parametrize(
    ("pattern", "ranks"),
    [
        ("mp_rank_00_model_states.pt", 2),
        ("zero_pp_rank_1_*_optim_states.pt", 2),  # of one rank, whose peer would go on alone
        ("rng_rank_1.pt", 2),
        ("*_optim_states.pt", 1),  # cut anew for another number of ranks
    ],
)
def test_code_in_the_place_of_tensors_is_refused_on_every_rank(run_dir, tmp_path, pattern, ranks):
    _poison(run_dir, pattern, tmp_path / "code_ran")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(next(folder(run_dir, 4).glob(pattern)), weights_only=True)
    code, output = resume(run_dir, ranks=ranks)
    assert code == 3, output
    assert output.count("error:") == 1
    assert "holds something other than tensors and plain values and was refused" in output
    assert "Traceback" not in output
    assert not (tmp_path / "code_ran").exists()


def _with_evil_fragments(argv: list[str], marker) -> int:
    """``train.py``, whose converted checkpoint somebody changes before it is loaded."""
    from megagpt.train import reshard

    convert = reshard._convert

    def changed(folder, converted) -> None:
        convert(folder, converted)
        for path in converted.rglob("exp_avg.pt"):
            torch.save(_Evil(marker), path)

    reshard._convert = changed
    return train_main(argv)


@pytest.mark.parametrize("where", ["shards to convert", "converted fragments"])
def test_code_is_refused_on_the_way_to_another_number_of_ranks(run_dir, tmp_path, where):
    marker = tmp_path / "code_ran"
    if where == "shards to convert":
        _poison(run_dir, "*_optim_states.pt", marker)
        code, output = resume(run_dir, ranks=1)
    else:
        argv = [str(word) for word in arguments(run_dir, max_steps=6)]
        ((code, output),) = run_ranks(_with_evil_fragments, 1, argv, marker)
    assert code == 3, output
    assert "cannot be cut anew for another number of ranks" in output or "was refused" in output
    assert "Traceback" not in output
    assert not marker.exists()
    assert not list((run_dir / "checkpoints").glob(".tmp*"))


def _read_weights(run_dir) -> str:
    try:
        weights.read_weights(run_dir)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("pattern", ["mp_rank_00_model_states.pt", "*_optim_states.pt"])
def test_code_in_weights_to_start_from_is_refused(run_dir, tmp_path, pattern):
    _poison(run_dir, pattern, tmp_path / "code_ran")
    ((message, _),) = run_ranks(_read_weights, 1, run_dir)
    assert "was refused, for loading it could run code" in message
    assert not (tmp_path / "code_ran").exists()
