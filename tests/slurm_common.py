"""Runs of ``train.py`` on the tests' own Slurm: how they are submitted, and how one sees where they are."""

import contextlib
import json
import os
import sys
from pathlib import Path

from corpora import tiny_corpus

# They stand for Slurm's commands where one batch script is run by hand, as the only task of a job on this host.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames "*) echo n1 ;;
    *" show node "*) echo "NodeName=n1 NodeAddr=127.0.0.1 NodeHostName=n1" ;;
    *) exit 1 ;;
esac
"""
ROOT = Path(__file__).parent.parent
NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
STEPS = 200
SAVE_EVERY = 10


def stand_ins(folder: Path) -> dict[str, str]:
    """The variables of a job whose srun and scontrol, in ``folder``, are the ones above."""
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "TMPDIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_SUBMIT_DIR": os.getcwd(),
    }


def write_config(folder: Path) -> Path:
    """``folder`` with the DeepSpeed file of the runs in it."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
    }
    (folder / "zero2.json").write_text(json.dumps(config))
    return folder


def arguments(folder: Path, run_dir: Path, *more) -> list:
    shape = ["--model", "tiny", "--n_layer", 1, "--d_model", 32, "--n_head", 2, "--seq_len", 32, "--dropout", 0.1]
    often = ["--log_interval", 1, "--save_interval", SAVE_EVERY, "--max_steps", STEPS]
    config = ["--ds_config", folder / "zero2.json"]
    return [*shape, *often, *config, "--data", tiny_corpus(), "--run_dir", run_dir, *more]


def submit(cluster, folder, script, *words, flags=(), **env) -> str:
    """``sbatch slurm/SCRIPT``, submitted from the repository as its user would."""
    output = f"--output={folder}/%x-%A-%a.out" if "--array" in str(flags) else f"--output={folder}/%x-%j.out"
    variables = {"PYTHON": sys.executable, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **env}
    return cluster.sbatch(*NODES, output, *flags, f"slurm/{script}", *words, cwd=ROOT, **variables)


def curve(run_dir: Path) -> list[tuple]:
    """Step, loss and norm of the gradient of every logged step."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def reach(cluster, job: str, run_dir: Path, step: int) -> None:
    cluster.until(lambda: last_step(run_dir) >= step, 180, f"step {step}", lambda: cluster.output(job))


def restart(cluster, job: str, restarts: int, timeout: float = 120) -> None:
    """Wait until the job is back in the queue, and spare it the two minutes that Slurm lets it wait there."""

    def requeued() -> bool:
        found = cluster.job(job)
        # Of a start whose script still lives Slurm would take the exit code for that of the next one.
        return found["Restarts"] == str(restarts) and found["JobState"] == "PENDING" and not cluster.processes(job)

    cluster.until(requeued, timeout, "the requeue", lambda: f"{cluster.job(job)}\n{cluster.output(job)}")
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")


def ranks(cluster, job: str) -> dict[int, int]:
    """The processes that train, by rank."""
    found = {}
    for pid, env in cluster.processes(job):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if "SLURM_PROCID" in env and b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found[int(env["SLURM_PROCID"])] = pid
    return found
