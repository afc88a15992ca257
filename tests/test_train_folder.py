"""Who may read and write what a run leaves: its user alone, unless asked for otherwise, whatever the shell's umask."""

import errno
import os
import stat
import subprocess
import sys

import pytest
from checkpoint_common import arguments, resume
from distributed import run_ranks, train_main

from megagpt.errors import ConfigError
from megagpt.train import folder
from megagpt.train.folder import private


def _train_carelessly(argv: list[str]) -> int:
    os.umask(0)
    return train_main(argv)


@pytest.mark.parametrize(
    ("umask", "files", "folders"), [(None, 0o600, 0o700), ("027", 0o640, 0o750)], ids=["own", "group"]
)
def test_files_of_a_run_are_for_its_user_or_the_group_and_never_for_all(tmp_path, umask, files, folders):
    env = {} if umask is None else {"MEGAGPT_UMASK": umask}
    argv = [str(word) for word in arguments(tmp_path / "run", max_steps=1, mirror=tmp_path / "mirror")]
    results = run_ranks(_train_carelessly, 2, argv, env=env)
    assert [code for code, _ in results] == [0, 0], results
    found = {
        path: stat.S_IMODE(path.stat().st_mode) for name in ("run", "mirror") for path in (tmp_path / name).rglob("*")
    }
    found |= {tmp_path / name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("run", "mirror")}
    assert {mode for path, mode in found.items() if path.is_dir()} == {folders}
    executable = {path.name for path, mode in found.items() if path.is_file() and mode != files}
    assert executable <= {"zero_to_fp32.py", "zero_to_torch.py"}, "DeepSpeed's, for which its user has one bit more"
    assert len(found) > 15


@pytest.mark.parametrize("part", ["", "checkpoints"], ids=["run folder", "checkpoints"])
def test_a_folder_that_everybody_can_write_to_is_refused(tmp_path, part):
    path = tmp_path / "run" / part
    path.mkdir(parents=True)
    path.chmod(0o777)
    code, output = resume(tmp_path / "run", ranks=1)
    assert code == 2, output
    assert "can be written by every user" in output
    assert f"chmod o-w {path}" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("told", ["000", "22", "0o77", "027x", "775"])
def test_a_mask_that_is_none_or_lets_everybody_write_is_refused(told):
    with pytest.raises(ConfigError, match="keep others from writing"), private({"MEGAGPT_UMASK": told}):
        pass


def test_the_mask_is_as_before_afterwards():
    before = os.umask(0o022)
    try:
        with private({}):
            assert os.umask(0o077) == 0o077
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


@pytest.mark.parametrize("queue", ["RUNNING", ""], ids=["its job runs", "its job is gone"])
def test_without_locks_a_folder_is_anothers_as_long_as_that_one_runs(queue, tmp_path, monkeypatch):
    """As on many clusters' disks. The owner is a Slurm job, and then a process of this host."""

    def without_locks(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder.fcntl, "flock", without_locks)
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n[ $3 = 12 ] && echo {queue}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        pid = other.pid if queue else 2**22 + 1  # of no process
        for job, owner in (
            ("Slurm job 12, ", "process 5 on n7"),
            ("", f"process {pid} on {os.uname().nodename}"),
        ):
            (tmp_path / ".lock").write_text(f"{job}{owner}, started 2026-01-01 00:00:00\n")
            if queue:
                with pytest.raises(ConfigError, match=f"is in use by {job}{owner}, started"):
                    folder._take_lock(tmp_path)
            else:
                folder._take_lock(tmp_path).close()
        monkeypatch.setenv("SLURM_JOB_ID", "12")  # requeued, it is the same one
        (tmp_path / ".lock").write_text("Slurm job 12, process 5 on n7, started 2026-01-01 00:00:00\n")
        folder._take_lock(tmp_path).close()
        other.communicate()
