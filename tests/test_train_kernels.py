"""Training with the fused kernels, and the choice of an attention that all ranks and all starts of a run share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import tiny_corpus
from distributed import free_port, rank_env, run_ranks, train

from megagpt.dist import World
from megagpt.train import report

REPO = Path(__file__).parent.parent
CONFIG = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
SHAPE = {"n_layer": 1, "d_model": 32, "n_head": 1, "d_ff": 48, "seq_len": 16, "dropout": 0.1}


def arguments(folder: Path, name: str, **changes) -> list[str]:
    """Flags of a run in ``folder``/``name``, of which ``changes`` replaces some."""
    config = folder / "ds.json"
    config.write_text(json.dumps(CONFIG))
    flags = {"ds_config": config, "model": "tiny", "data": tiny_corpus(), "run_dir": folder / name, **SHAPE}
    flags |= {"max_steps": 5, "schedule": "warmup_constant", "warmup_steps": 0, "lr": 1e-2, "log_interval": 1}
    return [str(word) for flag, value in (flags | changes).items() for word in (f"--{flag}", value)]


def losses(run_dir: Path) -> dict[int, float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def train_interpreted(argv: list[str], folder: Path) -> None:
    """``train.py`` on two ranks in fresh processes: Triton asks for its interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{REPO}:{REPO / 'kernels'}"}
    command, port, jobs = [sys.executable, str(REPO / "train.py"), *argv], free_port(), []
    for rank in range(2):
        env = environment | rank_env(rank, 2, port, str(folder))
        jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [job.communicate(timeout=200)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], "".join(outputs)


def test_under_zero3_kernels_and_torch_go_on_from_each_others_checkpoints(tmp_path):
    """Two steps with torch, two with interpreted kernels and recomputed blocks, one with torch: as five with torch.

    To 1e-4, the tolerance that training under ZeRO has against a plain loop.
    """
    codes, output = train(arguments(tmp_path, "torch", kernels="torch", save_interval=2), 2)
    assert codes == [0, 0], output
    source = tmp_path / "torch" / "checkpoints" / "global_step2"
    options = {"kernels": "triton", "activation_checkpointing": 1, "max_steps": 4, "resume": source}
    train_interpreted(arguments(tmp_path, "mixed", **options), tmp_path)
    kernels = report.read_run(tmp_path / "mixed")["kernels"]
    assert (kernels["backend"], kernels["attention"]) == ("triton", "triton")
    codes, output = train(arguments(tmp_path, "mixed", kernels="torch"), 2)
    assert codes == [0, 0], output
    expected, found = losses(tmp_path / "torch"), losses(tmp_path / "mixed")
    assert found == pytest.approx({step: expected[step] for step in (3, 4, 5)}, abs=1e-4)
    assert abs(expected[5] - expected[4]) > 1e-2, "an update has to matter for the comparison to mean anything"


def choose_on_a_rank(folder: str, flags: list[str]) -> list[str]:
    """What this rank takes when it is fresh, and when the run goes on; ranks measure different times."""
    import torch

    from megagpt.config import deepspeed
    from megagpt.config.fields import parse
    from megagpt.ops.choose import Choice
    from megagpt.train import engine, kernels
    from megagpt.train.plan import make_plan

    rank = int(os.environ["RANK"])
    world = World(rank, 2, rank, 2, 0, "127.0.0.1", int(os.environ["MASTER_PORT"]), "torch")
    settings = parse(flags)
    plan = make_plan(settings, deepspeed.load(settings.ds_config), world)
    engine.start_distributed(2)
    device = torch.device("cpu")
    ops = kernels.load(plan, device)

    def time(faster: str):
        """Milliseconds that make the last candidate faster on rank 0, and the first on rank 1, or the reverse."""
        rising = iter((1.0, 2.0) if (rank == 0) == (faster == "first") else (2.0, 1.0))
        return lambda work: next(rising)

    fresh = kernels.agree(ops, plan, device, kept=None, time=time("last"))
    if rank == 0:
        report.write_run(
            plan.run_dir, {"kernels": kernels.describe(ops, fresh)}, start_step=0, world_size=2, tokenizer=None
        )
    torch.distributed.barrier()
    again = kernels.agree(ops, plan, device, kept=kernels.earlier_choice(plan), time=time("first"))
    assert isinstance(again, Choice)
    assert again == fresh
    other = kernels.agree(ops, plan, device, kept=None, time=time("first"))
    engine.stop_distributed()
    return [fresh.attention, again.attention, other.attention]


def test_all_ranks_take_the_choice_of_rank_0_and_a_resumed_run_keeps_it(tmp_path):
    """The cpu backend's attention and torch's flash attention are the two that serve here."""
    flags = arguments(tmp_path, "run", dropout=0)
    taken = [result for result, _ in run_ranks(choose_on_a_rank, 2, str(tmp_path), flags)]
    assert taken == [["flash", "flash", "cpu"]] * 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())["kernels"]
    assert record["backend"] == "cpu"
    assert record["attention"] == "flash"
    assert record["milliseconds"] == {"cpu": 2.0, "flash": 1.0}
    assert record["dropped"].keys() == {"cudnn", "efficient"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": 3}', '{"kernels": {"attention": "flash"}}', "\0"])
def test_a_run_json_that_says_nothing_usable_is_no_earlier_choice(tmp_path, text):
    from megagpt.config import deepspeed
    from megagpt.config.fields import parse
    from megagpt.dist import resolve_world
    from megagpt.train import kernels
    from megagpt.train.plan import make_plan

    settings = parse(arguments(tmp_path, "run"))
    plan = make_plan(settings, deepspeed.load(settings.ds_config), resolve_world({}))
    assert kernels.earlier_choice(plan) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    assert kernels.earlier_choice(plan) is None
