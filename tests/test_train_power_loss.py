"""What a loss of power can leave of a run's folder, replayed from recordings of real saves: tests/power_loss.py."""

import os
import re

import pytest
from crash_disk import Disk, File
from disk_recorder import Recorder, Recording, read
from distributed import run_ranks
from power_loss import survey, survey_fresh_run, survey_resumed_run

from megagpt.data import storage
from megagpt.errors import CheckpointError
from megagpt.train import manifest, retention
from megagpt.train.metrics import MetricsFile


def test_after_a_loss_of_power_a_new_run_has_its_newest_complete_checkpoint_and_the_log_of_its_steps(tmp_path):
    """The names of new folders were never forced to disk, nor was the log: both could be gone beside a checkpoint."""
    assert survey_fresh_run(tmp_path, variants=2) > 300


def test_after_a_loss_of_power_a_resumed_run_has_too(run_dir):
    """It saves in the background, and a good checkpoint takes the place of a damaged one."""
    assert survey_resumed_run(run_dir.parent, variants=2) > 300


def _save_three_times(base, mistake: str | None) -> str:
    """What the survey says of saves with a mistake; in a process of its own, for a recorder stays."""
    out = base.with_name("recorded")
    out.mkdir(parents=True)
    base.mkdir()
    Recorder(str(base), out)
    fsync, root = storage.sync_path, base / "run" / manifest.FOLDER
    if mistake == "names of new folders":
        storage.make_folder = lambda path: path.mkdir(parents=True, exist_ok=True)
    if mistake == "name of a checkpoint":
        storage.sync_path = lambda path: None if path == root else fsync(path)
    storage.make_folder(root)
    log = MetricsFile(root.parent, -1)
    for step in (1, 2, 3):
        log.write({"step": step})
        if mistake != "log":
            log.sync()
        tmp = root / manifest.tmp_name(step)
        tmp.mkdir()
        with open(tmp / "shard.pt", "wb", buffering=0) as file:
            file.write(bytes(range(256)) * step)
            if mistake != "bytes of a file":
                os.fsync(file.fileno())
        manifest.commit(tmp, root / manifest.tag_name(step), [manifest.hash_file(tmp, "shard.pt")], {"step": step})
        retention.prune(root, 2, set())
    try:
        states = survey(read(out), base, 1, 0, {"run": 0}, 3)
    except (AssertionError, CheckpointError) as error:
        return str(error)
    return f"{states} states"


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        (None, r"\d+ states"),
        ("names of new folders", "run/checkpoints has lost step 1 and has 0"),
        ("name of a checkpoint", "run/checkpoints has lost step 1 and has 0"),
        ("bytes of a file", "is intact|has lost step"),
        ("log", r"the checkpoint is of step 1 and the log has set\(\)"),
    ],
    ids=str,
)
def test_what_is_not_forced_to_disk_is_found(tmp_path, mistake, found):
    ((told, _),) = run_ranks(_save_three_times, 1, tmp_path / "base", mistake)
    assert re.search(found, told), told


BEFORE = {"old": b"before", "folder/x": b"x"}


def _disk(*events: dict) -> Disk:
    disk = Disk(
        Recording([], {"new": b"whole", "log": b"one\ntwo\n"}, {"old": b"before", "folder/x": b"x"}, ["folder"])
    )
    for at, event in enumerate(events, 1):
        disk.do({"at": at, "began": at, "append": False, "content": None, **event})
    return disk


def _bytes(node: int, file: File) -> bytes:
    return b"?"


@pytest.mark.parametrize(
    ("events", "keep", "left"),
    [
        ([{"op": "open", "path": "a"}], [True], {"a": b"?"}),
        ([{"op": "open", "path": "a"}], [False], {}),
        ([{"op": "open", "path": "a"}, {"op": "sync", "path": "a", "content": "new"}], [True], {"a": b"whole"}),
        ([{"op": "open", "path": "a"}, {"op": "sync", "path": "a", "content": "new"}], [False], {}),
        ([{"op": "open", "path": "a"}, {"op": "sync", "path": "."}], [], {"a": b"?"}),
        ([{"op": "rename", "path": "old", "to": "new"}], [False], {"old": b"before"}),
        ([{"op": "rename", "path": "old", "to": "new"}], [True], {"new": b"before"}),
        ([{"op": "rename", "path": "folder/x", "to": "old"}, {"op": "sync", "path": "folder"}], [], {"old": b"x"}),
        ([{"op": "mkdir", "path": "d"}, {"op": "open", "path": "d/a"}], [False, True], {}),
        ([{"op": "remove", "path": "folder/x"}, {"op": "rmdir", "path": "folder"}], [True, False], {}),
    ],
)
def test_a_disk_keeps_what_was_forced_to_it_and_any_of_the_rest(events, keep, left):
    untouched = dict(BEFORE)
    for event in events:
        if event["op"] in ("rename", "remove"):
            untouched.pop(event["path"], None)
            untouched.pop(event.get("to"), None)
    found = _disk(*events).crash(keep, _bytes)
    assert {path: data for path, data in found.items() if not path.endswith("/")} == {**untouched, **left}
