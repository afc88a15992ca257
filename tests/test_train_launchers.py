"""The same command under every launcher: deepspeed, torchrun, Slurm's variables, and plain python."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import tiny_corpus
from distributed import free_port

REPO = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def arguments(run_dir: Path) -> list[str]:
    shape = ["--n_layer", 1, "--d_model", 32, "--n_head", 2, "--seq_len", 16, "--max_steps", 2]
    words = ["--ds_config", REPO / "ds_configs/cpu.json", "--model", "tiny", *shape, "--data", tiny_corpus()]
    return [str(word) for word in [*words, "--run_dir", run_dir, "--micro_batch_size", 2, "--eval_interval", 1]]


def clean_env(folder: Path, **more) -> dict[str, str]:
    """This environment without what another launcher left in it."""
    prefixes = ("SLURM_", "MASTER_", "LOCAL_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions"), **more}


def ranks_of(run_dir: Path) -> int:
    return json.loads((run_dir / "run.json").read_text())["starts"][-1]["world_size"]


def run(command: list, env: dict) -> str:
    done = subprocess.run(
        [str(word) for word in command], env=env, cwd=REPO, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        (lambda: [BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port()], 2),
        (lambda: [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()], 2),
        (lambda: [BIN / "megagpt", "launch", "--num_gpus", 2], 2),
        (lambda: [sys.executable], 1),
    ],
    ids=["deepspeed", "torchrun", "megagpt launch", "python"],
)
def test_each_launcher_trains(launcher, ranks, tmp_path):
    output = run([*launcher(), "train.py", *arguments(tmp_path / "run")], clean_env(tmp_path))
    assert ranks_of(tmp_path / "run") == ranks
    assert "saved" in output
    assert (tmp_path / "run" / "checkpoints" / "global_step2" / "manifest.json").exists()


def test_ctrl_c_says_where_the_same_command_goes_on(tmp_path):
    longer = ["--max_steps", "100000", "--save_interval", "1"]
    with subprocess.Popen(
        [sys.executable, "train.py", *arguments(tmp_path / "run"), *longer],
        env=clean_env(tmp_path, PYTHONUNBUFFERED="1"),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert any("saved" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    newest = max(int(path.name[11:]) for path in (tmp_path / "run" / "checkpoints").glob("global_step*"))
    assert re.search(rf"interrupted after step \d+; the same command goes on from step {newest}$", rest, re.M), rest
    assert process.returncode == 130


def test_two_tasks_under_slurms_variables_find_each_other(tmp_path):
    def start(rank):
        slurm = {
            "SLURM_JOB_ID": job,
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "MASTER_PORT": port,
        }
        command = [sys.executable, "train.py", *arguments(tmp_path / "run")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=REPO, env=clean_env(tmp_path, **slurm), **pipes)

    port, job = str(free_port()), str(free_port())
    tasks = [start(rank) for rank in range(2)]
    outputs = [task.communicate(timeout=180)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert ranks_of(tmp_path / "run") == 2


def test_a_mistake_under_the_deepspeed_launcher_is_said_once(tmp_path):
    command = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "train.py", *arguments(tmp_path / "r")]
    command += ["--lerning_rate", 1]
    done = subprocess.run(
        [str(word) for word in command], env=clean_env(tmp_path), cwd=REPO, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: unknown flag --lerning_rate") == 1
    assert "Traceback" not in done.stderr
