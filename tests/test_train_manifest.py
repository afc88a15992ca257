"""Checkpoint folders: what is found damaged, what is kept, what a rename promises."""

import errno
import json
import os
import stat

import pytest
from distributed import run_ranks

from megagpt.data import storage
from megagpt.errors import CheckpointError
from megagpt.train import manifest, retention


def make(root, step, files=None):
    """A committed checkpoint of ``step`` with ``files`` {name: bytes}."""
    files = files or {"a.pt": b"x" * 5000, "sub/b.pt": b"y" * 70_000}
    tmp = root / manifest.tmp_name(step)
    for name, content in files.items():
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(content)
    entries = [manifest.hash_file(tmp, name) for name in files]
    manifest.commit(tmp, root / manifest.tag_name(step), entries, {"step": step})
    return root / manifest.tag_name(step)


def test_a_committed_checkpoint_verifies_and_any_split_of_the_work_agrees(tmp_path):
    folder = make(tmp_path, 7)
    assert manifest.problem(folder) is None
    (folder / "sub/b.pt").write_bytes(b"z" * 70_000)
    assert manifest.problem(folder, part=0, parts=2) is None  # the part that does not hold the damage
    assert "SHA-256" in manifest.problem(folder, part=1, parts=2)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m.clear(), "lists no files"),
        (lambda m: m.update(format=99), "its format is 99"),
        (lambda m: m.update(step=3), "its manifest is of step 3"),
        (lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}), "impossible entry"),
        (lambda m: m["files"].update({"a.pt": 5}), "impossible entry"),
    ],
)
def test_an_edited_manifest_is_refused_with_its_reason(tmp_path, edit, words):
    folder = make(tmp_path, 2)
    content = json.loads((folder / manifest.MANIFEST).read_text())
    edit(content)
    manifest.write(folder, content)
    assert words in manifest.problem(folder)


def test_only_whole_folders_with_a_step_name_count_and_links_do_not(tmp_path):
    make(tmp_path, 9)
    make(tmp_path, 10)
    (tmp_path / "global_step11").symlink_to(tmp_path / "global_step9")
    (tmp_path / "global_stepx").mkdir()
    (tmp_path / manifest.tmp_name(12)).mkdir()
    (tmp_path / "global_step13").write_text("a file")
    assert [manifest.step_of(p) for p in manifest.folders(tmp_path)] == [10, 9]
    assert [p.name for p in retention.remove_leftovers(tmp_path)] == [manifest.tmp_name(12)]
    assert not (tmp_path / manifest.tmp_name(12)).exists()


def test_pruning_keeps_the_newest_and_the_named_and_nothing_that_is_not_ours(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    (tmp_path / "notes").mkdir()
    assert retention.prune(tmp_path, keep_last=3, keep={2}) == [3, 1]
    assert [manifest.step_of(p) for p in manifest.folders(tmp_path)] == [6, 5, 4, 2]
    assert (tmp_path / "notes").is_dir()
    retention.prune(tmp_path, keep_last=0, keep=set())
    assert [manifest.step_of(p) for p in manifest.folders(tmp_path)] == [6, 5], "two always stay"


def test_pruning_neither_counts_nor_deletes_what_was_passed_over(tmp_path):
    for step in range(1, 7):
        make(tmp_path, step)
    assert retention.prune(tmp_path, keep_last=2, keep=set(), passed_over={6, 5}) == [2, 1]
    assert [manifest.step_of(p) for p in manifest.folders(tmp_path)] == [6, 5, 4, 3]


def _newest_on_this_rank(folder):
    """What a run resumes from, where each rank sees a folder of its own: that of another node, not yet up to date."""
    import torch

    from megagpt.train import checkpoint

    torch.distributed.init_process_group("gloo")
    try:
        root = folder / f"seen_by_rank{torch.distributed.get_rank()}"
        found, skipped = manifest.newest_intact(root, checkpoint.problem, checkpoint.folders)
        return found.name, skipped
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_agree_where_one_does_not_see_the_newest_checkpoint_yet(tmp_path):
    """Each rank went through its own list, and they waited for each other with different questions."""
    for rank, steps in enumerate(([1, 2, 3], [1, 2])):
        root = tmp_path / f"seen_by_rank{rank}"
        for step in steps:
            make(root, step)
    answers = [answer for answer, _ in run_ranks(_newest_on_this_rank, 2, tmp_path)]
    assert answers == [("global_step2", ["skipped checkpoint global_step3: it has no manifest.json"])] * 2


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    for step in (30, 40):
        make(tmp_path / "checkpoints", step)
    with pytest.raises(CheckpointError, match=r"step35 does not exist; .* or one of global_step40, global_step30$"):
        manifest.locate(tmp_path / "checkpoints" / "global_step35")


@pytest.mark.parametrize("state", ["[]", '{"model": {}, "data": []}', "3", "{", '{"data": {}}'])
def test_a_state_of_another_form_is_no_source_of_weights(tmp_path, state):
    (make(tmp_path, 3) / manifest.STATE).write_text(state)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        manifest.read_source(tmp_path)


def test_latest_is_replaced_whole(tmp_path):
    manifest.write_latest(tmp_path, 5)
    manifest.write_latest(tmp_path, 6)
    assert (tmp_path / "latest").read_text() == "global_step6"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest"]


def refusing(refuses, call):
    """``call``, where ``refuses(path, ...)`` says so as on a disk that fails."""

    def called(*args):
        if refuses(*args):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args)

    return called


def test_a_latest_that_cannot_be_written_leaves_nothing_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(lambda fd: True, os.fsync))
    with pytest.raises(OSError, match="Input/output error"):
        manifest.write_latest(tmp_path, 5)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_fsync_of_folders_takes_checkpoints_and_one_that_loses_bytes_does_not(tmp_path, monkeypatch):
    """Some network disks answer the fsync of a folder with EINVAL, as POSIX allows."""
    fsync, refused = os.fsync, {True}

    def partly(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode) in refused:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", partly)
    assert manifest.problem(make(tmp_path, 3)) is None
    manifest.write_latest(tmp_path, 3)
    refused.add(False)
    with pytest.raises(OSError, match="Invalid argument"):
        make(tmp_path, 5)
    with pytest.raises(OSError, match="Invalid argument"):
        storage.sync_path(tmp_path / "latest")
    assert [folder.name for folder in manifest.folders(tmp_path)] == ["global_step3"]


@pytest.mark.parametrize(
    ("what", "left"), [("rename", {".tmp-global_step3", "global_step3"}), ("fsync", {"global_step3"})]
)
def test_a_commit_that_fails_in_the_place_of_an_earlier_one_leaves_that_or_the_new_one(
    tmp_path, monkeypatch, what, left
):
    """The earlier one stayed behind under a hidden name, in the first case as the only one. ``save`` removes .tmp-."""
    folder = make(tmp_path, 3)
    with monkeypatch.context() as patch:
        if what == "rename":
            patch.setattr(os, "rename", refusing(lambda old, new: old.name == manifest.tmp_name(3), os.rename))
        else:
            patch.setattr(storage, "sync_path", refusing(lambda path: path == tmp_path, storage.sync_path))
        with pytest.raises(OSError, match="Input/output error"):
            make(tmp_path, 3)
    assert manifest.problem(folder) is None
    assert {path.name for path in tmp_path.iterdir()} == left
