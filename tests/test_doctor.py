"""``megagpt doctor``: each finding on a machine in that state, and the whole command on this one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megagpt.errors import ConfigError
from megagpt.tools import doctor, doctor_host, doctor_packages
from megagpt.tools.doctor_finding import Finding, error, warning

ROOT = Path(__file__).parent.parent


def levels(findings):
    return [finding.level for finding in findings]


def run_doctor(tmp_path, *flags, **env):
    """The whole command in a process of its own: its exit code and output."""
    extensions = tmp_path / "extensions"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "TORCH_EXTENSIONS_DIR": str(extensions), **env}
    command = [sys.executable, "-m", "megagpt", "doctor", "--run_dir", str(tmp_path / "runs"), *flags]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=170)


@pytest.mark.timeout(180)
def test_one_object_with_every_check_and_the_exit_code(tmp_path):
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    done = run_doctor(tmp_path, "--json", RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29501")
    found = json.loads(done.stdout)
    names = [finding["name"] for finding in found["findings"]]
    expected = ["Python", "torch", "GPU", "nvcc", "compiler", "Triton", "kernels", "DeepSpeed", "apex"]
    expected += ["build lock", "caches", "disk", "shared memory", "Slurm", "ranks"]
    assert [name for name in names if name != "capability"] == expected
    by_name = {finding["name"]: finding for finding in found["findings"]}
    assert by_name["build lock"]["level"] == "error"
    assert by_name["build lock"]["way_out"] == "megagpt doctor --remove_locks"
    assert "LOCAL_RANK not" in by_name["ranks"]["found"]
    assert by_name["ranks"]["level"] == "error"
    assert by_name["kernels"]["found"].startswith(("cpu for gpt1", "triton for gpt1"))
    assert "fused_adam" in by_name["DeepSpeed"]["found"]
    assert found["code"] == done.returncode == 2
    for finding in found["findings"]:
        assert finding["level"] == "ok" or (finding["meaning"] and finding["way_out"]), finding


def test_the_screen_tells_meaning_and_way_out_below_what_is_wrong():
    findings = [Finding("disk", "1.0 GB free"), warning("nvcc", "missing", "slower", "install it"), Finding("x", "y")]
    screen = list(doctor.lines(findings))
    assert screen[0] == " ok   disk  1.0 GB free"
    assert screen[1:4] == ["warn  nvcc  missing", "            slower", "            -> install it"]
    assert screen[-1].startswith("\n1 warning;")
    assert all(len(line) < 200 for line in screen)


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([Finding("a", "b")], 0),
        ([Finding("a", "b"), warning("a", "b", "c", "d")], 1),
        ([error("a", "b", "c", "d"), warning("a", "b", "c", "d")], 2),
    ],
    ids=["well", "warnings", "errors"],
)
def test_the_exit_code_is_that_of_the_worst(findings, code):
    assert doctor.exit_code(findings) == code


def test_a_lock_is_removed_only_where_no_process_holds_it(tmp_path):
    """torch's builds keep the file open while they compile; what a killed one left is open nowhere."""
    stale, live = (tmp_path / name / "lock" for name in ("fused_adam", "cpu_adam"))
    for lock in (stale, live):
        lock.parent.mkdir()
        lock.touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", f"f = open({str(live)!r}); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        looked = list(doctor_host.locks(tmp_path, remove=False))
        assert sorted(levels(looked)) == ["error", "ok"]
        assert stale.exists()
        removed = list(doctor_host.locks(tmp_path, remove=True))
        assert levels(removed) == ["ok", "ok"]
        assert live.exists()
        assert not stale.exists()
    finally:
        holder.kill()
        holder.wait()
    assert levels(doctor_host.locks(tmp_path, remove=True)) == ["ok"]
    assert not live.exists()


def test_a_lock_of_another_host_is_left_for_a_day(tmp_path):
    """On a network disk the process that holds it may be out of sight."""
    lock = tmp_path / "lock"
    lock.touch()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/export {tmp_path} nfs4 rw 0 0\n")
    assert doctor_host.held(lock, mounts)
    long_ago = time.time() - 25 * 3600
    os.utime(lock, (long_ago, long_ago))
    assert not doctor_host.held(lock, mounts)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("nfs4", "nfs4"), ("lustre", "lustre"), ("fuse.sshfs", "fuse.sshfs"), ("ext4", None), ("tmpfs", None)],
)
def test_the_innermost_mount_tells_whether_a_folder_is_on_the_network(tmp_path, kind, found):
    mounts, inner = tmp_path / "mounts", tmp_path / "with a space"
    shown = str(inner).replace(" ", r"\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/a {tmp_path} xfs rw 0 0\nserver:/b {shown} {kind} rw 0 0\n")
    assert doctor_host.network_file_system(inner / "cache" / "not there yet", mounts) == found
    assert doctor_host.network_file_system(tmp_path / "with", mounts) is None


@pytest.mark.parametrize(
    ("files", "level", "told"),
    [
        ((), "ok", "not needed"),
        (("apex/__init__.py",), "warning", "is not NVIDIA's"),
        (("apex/__init__.py", "apex/optimizers/__init__.py"), "warning", "without its CUDA extensions"),
        (("apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"), "ok", "NVIDIA's"),
    ],
    ids=["none", "PyPI's", "without extensions", "NVIDIA's"],
)
def test_apex_is_told_from_the_package_of_its_name(tmp_path, monkeypatch, files, level, told):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor_packages.apex()
    assert (found.level, told in found.found) == (level, True), found


def test_ranks_are_those_that_a_run_would_take():
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_ID": "0",
        "SLURM_NODEID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_JOB_ID": "17",
    }
    found = doctor_host.ranks({**slurm, "SLURM_STEP_NODELIST": "localhost"})
    assert found.level == "ok"
    assert found.found.startswith("rank 3 of 4 (slurm), 1 of 2 on ")
    assert found.found.endswith("localhost:20017")
    found = doctor_host.ranks({**slurm, "MASTER_ADDR": "no host"})
    assert found.level == "error"
    assert "has no address here" in found.meaning
    assert doctor_host.ranks({}).level == "ok"


def test_a_disk_too_small_for_the_checkpoints_is_told(tmp_path):
    assert doctor_host.disk(tmp_path / "not" / "there", "tiny").level == "ok"
    found = doctor_host.disk(tmp_path, "175b")
    assert found.level == "warning"
    assert "12.2 TB" in found.meaning
    with pytest.raises(ConfigError, match="--model gpt9 is unknown"):
        doctor_host.disk(tmp_path, "gpt9")


def test_shared_memory_is_measured_against_the_ranks_of_the_host():
    assert doctor_host.shared_memory({"LOCAL_WORLD_SIZE": "1"}).level == "ok"
    assert doctor_host.shared_memory({"LOCAL_WORLD_SIZE": "1000000"}).level == "warning"
