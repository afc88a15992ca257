"""``slurm/common.sh`` with stand-ins for srun and scontrol: signals that come at a bad time, a port that is taken."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each call is noted. One that runs something on every node does nothing; another one is the ranks, and ends with CODE.
SRUN = """#!/bin/bash
case "$*" in
    *"-- prepare "* | *" prepare "*) echo prepare >>"$LOG"; hook=${AT_PREPARE:-} ;;
    *" rm -rf "*) echo clean >>"$LOG"; hook=${AT_CLEAN:-} ;;
    *) echo "ranks at $MASTER_ADDR:$MASTER_PORT" >>"$LOG"; exit "$CODE" ;;
esac
if [ "$hook" ]; then kill -s "$hook" "$PPID"; fi
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames "*) echo n1 ;;
    *" show node "*) echo "NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=n1" ;;
    *) echo "scontrol $*" >>"$LOG" ;;
esac
"""


@pytest.fixture
def batch(tmp_path):
    """Run a batch script; its exit code, and the calls it made."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(code: int, job: int = 7, **env: str) -> tuple[int, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        slurm = {"SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
        slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        command = ["bash", ROOT / "slurm/pretrain.sbatch", "--run_dir", tmp_path / "run"]
        env = {**kept, **slurm, "LOG": str(log), "CODE": str(code), **env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, log.read_text().splitlines()

    return run


REQUEUE = ["scontrol requeue 7", "scontrol update JobId=7 StartTime=now"]


def test_a_job_that_has_saved_is_requeued(batch):
    assert batch(75) == (75, ["prepare", "ranks at 127.0.0.1:20007", "clean", *REQUEUE])
    assert batch(0) == (0, ["prepare", "ranks at 127.0.0.1:20007", "clean"])


def test_a_signal_after_the_ranks_have_ended_does_not_keep_the_job_from_being_requeued(batch):
    """The trap's own command failed, and with it the script, before it came to that."""
    assert batch(75, AT_CLEAN="USR1") == (75, ["prepare", "ranks at 127.0.0.1:20007", "clean", *REQUEUE])


def test_a_signal_before_the_ranks_start_requeues_the_job_and_scancel_ends_it(batch):
    assert batch(0, AT_PREPARE="USR1") == (75, ["prepare", "clean", *REQUEUE])
    assert batch(0, AT_PREPARE="TERM") == (75, ["prepare"])


def test_a_port_that_another_program_has_is_passed_over(batch):
    with socket.socket() as other:
        for job in range(1000, 9000, 37):  # a port that is free now
            try:
                other.bind(("127.0.0.1", 20000 + job))
            except OSError:
                continue
            break
        other.listen()
        _, calls = batch(0, job)
    assert calls[1] == f"ranks at 127.0.0.1:{20000 + (20000 + job + 3001) % 10000}"
    assert batch(0, job, MASTER_PORT="4321")[1][1] == "ranks at 127.0.0.1:4321"
