"""``megagpt slurm`` and the scripts that train nothing, on a real Slurm of two nodes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import free_port
from slurm_common import restart

from megagpt.data.main import data_main, prepare_main

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.timeout(300)


def program(path: Path, text: str) -> Path:
    """A script that stands for the interpreter."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def megagpt(cluster, *words, cwd: Path = ROOT) -> str:
    env = {**cluster.env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megagpt", *map(str, words)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_awkward_names_reach_the_ranks_as_they_were_typed(cluster, tmp_path):
    """Through megagpt slurm submit, sbatch, bash and srun; the run's own folder has such a name as well."""
    run_dir = tmp_path / 'it\'s a "$HOME" run\n-x;`touch pwned`*'
    python = program(tmp_path / "show", '#!/bin/bash\nprintf "%s\\0" "$@" >"$TMPDIR/argv$SLURM_PROCID"\n')
    arguments = ["--run_dir", run_dir, "--data", "-x", "--note=$(touch pwned) {{ 1 }}", "", " \t", "é\u202e"]
    flags = ["--nodes", 2, "--gpus_per_node", 1, "--cpus_per_task", 1, "--output", tmp_path / "log", "--set"]
    variables = [f"PYTHON={python}", f"TMPDIR={tmp_path}"]
    told = megagpt(cluster, "slurm", "submit", *flags, *variables, "--", *arguments, cwd=tmp_path)
    job = told.split()[1].rstrip(";")
    assert cluster.wait(job) == "COMPLETED", (tmp_path / "log").read_text()
    for rank in range(2):
        argv = (tmp_path / f"argv{rank}").read_bytes().decode().split("\0")[:-1]
        assert argv[4:] == [str(word) for word in arguments]
    assert not list(tmp_path.rglob("pwned"))
    assert not list(tmp_path.glob("megagpt-*"))  # the caches of compiled kernels
    name = cluster.job(job)["JobName"]
    assert name.startswith("megagpt-it_s_a_HOME_run_-x_touch_pwned")
    shown = megagpt(cluster, "slurm", "status", run_dir)
    assert shown.endswith(f"  job {job} has ended\n".replace("job ", ""))


def test_the_status_of_a_run_names_its_task_of_an_array(cluster, tmp_path):
    """The queue calls it 12_4, and the task itself is told a number of its own."""
    python = program(tmp_path / "waits", '#!/bin/bash\nuntil [ -e "$TMPDIR/go" ]; do sleep 0.1; done\n')
    flags = ["--array=4", "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", f"--output={tmp_path}/log"]
    words = ["slurm/array.sbatch", "--run_dir", tmp_path / "runs"]
    job = cluster.sbatch(*flags, *words, cwd=ROOT, PYTHON=str(python), TMPDIR=str(tmp_path))
    run_dir = tmp_path / "runs" / "4"
    cluster.until(lambda: list(run_dir.glob("slurm/*")), 60, "the start")
    shown = megagpt(cluster, "slurm", "status", run_dir)
    (tmp_path / "go").touch()
    assert cluster.wait(f"{job}_4") == "COMPLETED"
    assert f"  {job}_4 RUNNING, " in shown
    assert f"{job} has ended" not in shown


def test_ranks_get_the_variables_that_they_need_and_no_secrets(cluster, tmp_path):
    """And their nodes, which seem to have GPUs, are warmed once each before."""
    warms = 'if [ "$2" = megagpt ]; then echo "${*:3:3}" >>"$TMPDIR/warm"; exit; fi'
    shows = 'wc -l <"$TMPDIR/warm" >"$TMPDIR/warmed$SLURM_PROCID"\nenv -0 >"$TMPDIR/env$SLURM_PROCID"'
    python = program(tmp_path / "show", f"#!/bin/bash\n{warms}\n{shows}\n")
    program(tmp_path / "nvidia-smi", "#!/bin/sh\n")
    flags = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=3", f"--output={tmp_path}/log"]
    asked = {"PYTHON": str(python), "TMPDIR": str(tmp_path), "NCCL_SOCKET_IFNAME": "ib0", "SERVICE_TOKEN": "hush"}
    asked |= {
        "PATH": f"{tmp_path}:{cluster.env['PATH']}",
        "PYTHONPATH": "elsewhere",
        "WANDB_MODE": "offline",
        "MEGAGPT_EXPORT": "WANDB_MODE",
    }
    job = cluster.sbatch(*flags, "slurm/pretrain.sbatch", "--run_dir", tmp_path / "run", cwd=ROOT, **asked)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    for rank in range(2):
        text = (tmp_path / f"env{rank}").read_text()
        env = dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
        assert not {"SERVICE_TOKEN", "PYTHONPATH"} & env.keys()
        assert env["NCCL_SOCKET_IFNAME"] == "ib0"
        assert env["WANDB_MODE"] == "offline"
        assert env["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "3")
        assert env["SLURM_CPUS_PER_TASK"] == "3"
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert 20000 <= int(env["MASTER_PORT"]) < 30000
        assert env["TRITON_CACHE_DIR"].startswith(f"{tmp_path}/megagpt-{job}-")
        assert env["TORCH_EXTENSIONS_DIR"].startswith(f"{tmp_path}/megagpt-{job}-")
        assert (tmp_path / f"warmed{rank}").read_text().strip() == "2"
    assert (tmp_path / "warm").read_text() == 2 * f"warm --ds_config {ROOT}/ds_configs/zero2_bf16.json\n"


def test_one_rank_that_fails_ends_the_job_at_once_with_its_code(cluster, tmp_path):
    """The other one would sleep for minutes; killed, it ends with 143, which is the higher code and not the cause."""
    fails = f'echo 7 >"$MEGAGPT_EXIT_FILE"; touch "{tmp_path}/died"; exit 7'
    python = program(tmp_path / "fails", f"#!/bin/bash\nif ((SLURM_PROCID)); then {fails}; fi\nsleep 250\n")
    flags = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    words = ["--run_dir", tmp_path / "run"]
    job = cluster.sbatch(*flags, "slurm/finetune.sbatch", *words, cwd=ROOT, PYTHON=str(python))
    assert cluster.wait(job) == "FAILED", cluster.output(job)
    assert time.time() - (tmp_path / "died").stat().st_mtime < 15
    assert cluster.job(job)["ExitCode"] == "7:0"
    assert cluster.job(job)["Restarts"] == "0"
    assert not cluster.processes()


def test_a_run_of_a_study_is_requeued_as_others_are(cluster, tmp_path):
    """It saves and asks for more time at its first start, and is done at its second."""
    saves = 'touch "$folder/begun"; echo 75 >"$MEGAGPT_EXIT_FILE"; exit 75'
    shows = 'printf "%s\\0" "$@" >"$folder/argv"'
    python = program(
        tmp_path / "trains",
        f'#!/bin/bash\nfolder=${{@: -1}}\nif [ ! -e "$folder/begun" ]; then {saves}; fi\n{shows}\n',
    )
    study = ["study", "layers", "--run_dir", "s", "--seeds", 5, "--values", 2, "--slurm"]
    told = megagpt(cluster, *study, "--", "--init_from", "it's $HOME", cwd=tmp_path)
    assert "1 runs are missing; start them with: sbatch s/array.sbatch" in told
    flags = ["--cpus-per-task=1", "s/array.sbatch"]
    array = cluster.sbatch(*flags, cwd=tmp_path, PYTHON=str(python), TMPDIR=str(tmp_path))
    job = cluster.job(f"{array}_1")["JobId"]
    restart(cluster, job, 1)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    argv = (tmp_path / "s/2-5/argv").read_bytes().decode().split("\0")[:-1]
    assert argv[:2] == ["-u", f"{ROOT}/finetune.py"]
    assert argv[4:] == ["--init_from", "it's $HOME", "--n_transfer", "2", "--seed", "5", "--run_dir", "s/2-5"]


_WHERE = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from megagpt.config.fields import parse
from megagpt.dist import resolve_world
world = resolve_world(os.environ)
flags = parse([*sys.argv[1:], "--ds_config", "x", "--data", "x"])  # what a launcher puts before our flags is dropped
Path(flags.run_dir, f"{world.launcher}{world.rank}").write_text(json.dumps(asdict(world)))
"""
# As in docs/slurm.md, for two nodes with one GPU each.
_LAUNCHERS = """
export PYTHONPATH={root} MASTER_ADDR=127.0.0.1
scontrol show hostnames | sed 's/$/ slots=1/' >hostfile
deepspeed --launcher slurm --hostfile hostfile --no_ssh_check --master_addr $MASTER_ADDR \\
    --launcher_args='--kill-on-bad-exit=1' where.py --run_dir $PWD
srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c 'torchrun --nnodes $SLURM_NNODES --nproc_per_node 1 \\
    --node_rank $SLURM_NODEID --master_addr $MASTER_ADDR --master_port {port} where.py --run_dir $PWD'
"""


def test_the_launchers_of_deepspeed_and_torch_start_ranks_that_know_their_places(cluster, tmp_path):
    (tmp_path / "where.py").write_text(_WHERE)
    port = free_port()
    script = program(tmp_path / "job", "#!/bin/bash -e\n" + _LAUNCHERS.format(root=ROOT, port=port))
    path = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
    flags = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    job = cluster.sbatch(*flags, script, cwd=tmp_path, PATH=path, DS_ACCELERATOR="cpu")
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    for launcher in ("slurm", "torch"):
        worlds = [json.loads((tmp_path / f"{launcher}{rank}").read_text()) for rank in range(2)]
        places = [[world[name] for name in ("rank", "world_size", "local_rank", "node_rank")] for world in worlds]
        assert places == [[0, 2, 0, 0], [1, 2, 0, 1]], cluster.output(job)
        assert worlds[0]["master_port"] == worlds[1]["master_port"]
        assert {world["master_addr"] for world in worlds} == {"127.0.0.1"}


def test_a_corpus_prepared_in_shards_is_that_of_one_process(cluster, tmp_path, texts, tokenizer):
    common = ["--input", str(tmp_path / "input"), "--tokenizer", str(tokenizer), "--valid_fraction", "0.2"]
    flags = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    words = [*common, "--output", tmp_path / "sharded"]
    job = cluster.sbatch(*flags, "slurm/preprocess.sbatch", *words, cwd=ROOT, PYTHON=sys.executable)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    assert prepare_main([*common, "--output", str(tmp_path / "alone")]) == 0
    for name in ("", "-valid"):
        for ending in (".bin", ".idx"):
            ours, theirs = (tmp_path / f"{prefix}{name}{ending}" for prefix in ("sharded", "alone"))
            assert ours.read_bytes() == theirs.read_bytes(), ours
    assert data_main(["verify", str(tmp_path / "sharded")]) == 0


def test_a_container_gets_the_folders_and_the_command(cluster, tmp_path):
    """The container's own program is missing here: one that shows what it was asked to do stands for it."""
    shows = program(tmp_path / "apptainer", '#!/bin/bash\nprintf "%s\\0" "$@" >"$TMPDIR/argv"\n')
    flags = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    asked = {"APPTAINER": str(shows), "IMAGE": "my image.sif", "TMPDIR": str(tmp_path), "MOUNTS": "/data/some where"}
    asked["PYTHON"] = "python"  # whatever these tests were started with
    job = cluster.sbatch(*flags, "slurm/container.sbatch", "--run_dir", tmp_path / "run", cwd=ROOT, **asked)
    assert cluster.wait(job) == "COMPLETED", cluster.output(job)
    argv = (tmp_path / "argv").read_bytes().decode().split("\0")[:-1]
    bound = [word for folder in (ROOT, ROOT, tmp_path, "/data/some where") for word in ("--bind", str(folder))]
    expected = ["exec", "--nv", "--pwd", str(ROOT), *bound, "my image.sif", "python", "-u", f"{ROOT}/train.py"]
    assert argv[: len(expected)] == expected
    assert argv[-2:] == ["--run_dir", str(tmp_path / "run")]
