"""``megagpt plan --measure``: a few real steps of two shallow models on this machine, which correct the estimate.

``train.py`` runs the planned width, sequence length and micro-batch with few blocks, on one device, twice. A
micro-step's time is a part that does not depend on the depth and a part for each block: two runs give both. What one
device does not show, collectives, stays an estimate.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megagpt.data.writer import CorpusWriter, Counts
from megagpt.errors import ConfigError
from megagpt.tools.plan_hardware import MEMORY_SHARE
from megagpt.tools.plan_search import ds_config
from megagpt.tools.plan_time import UPDATE_BYTES, token_time
from megagpt.tools.slurm_script import HOME

WARM, TIMED = 4, 8  # steps
_PATIENCE = 900.0  # seconds for one of the runs
_STAGE = 1
_CPU = "cores of a CPU"


@dataclass(frozen=True)
class Measured:
    """Seconds of a micro-step's computation at the planned depth, by the estimate and from what was measured."""

    device: str
    blocks: tuple[int, int]
    milliseconds: tuple[float, float]  # of a step with so many blocks
    estimated: float
    measured: float

    @property
    def correction(self) -> float:
        return self.measured / self.estimated

    def lines(self) -> Iterator[str]:
        """For the screen."""
        runs = ", ".join(f"{n} blocks {ms:.1f} ms" for n, ms in zip(self.blocks, self.milliseconds, strict=True))
        yield (
            f"measured on {self.device}: {runs}; a micro-step of the whole model then takes {self.measured:.4g} s, "
            f"estimated {self.estimated:.4g} s: computation is corrected by {self.correction:.3g}"
        )
        if self.device.endswith(_CPU):
            yield "warning: there is no GPU here: what follows is planned for GPUs as slow as this CPU"


def measure(plan) -> Measured:
    """Run both models. Raises ConfigError where training does not run here."""
    job, layout = plan.job, plan.best.layout
    config = replace(job.config, activation_checkpointing=plan.best.checkpointing)
    blocks = (2, 4) if config.n_layer >= 4 else (1, 2)
    tokens = layout.micro_batch * config.seq_len
    computing, milliseconds, device = [], [], ""
    with tempfile.TemporaryDirectory(prefix="megagpt-plan-") as folder:
        corpus = _corpus(Path(folder), config.vocab_size, config.seq_len)
        for n in blocks:
            shallow = replace(config, n_layer=n)
            step, device = _train(Path(folder), shallow, plan, corpus)
            milliseconds.append(1e3 * step)
            update = shallow.n_params() * UPDATE_BYTES / (job.gpu.bandwidth * MEMORY_SHARE)
            computing.append(max(step / 2, step - update))
    a_block = (computing[1] - computing[0]) / (blocks[1] - blocks[0])
    whole = computing[0] + max(0.0, a_block) * (config.n_layer - blocks[0])
    estimated = sum(token_time(config, job.gpu, job.precision).values()) * tokens
    return Measured(device, blocks, tuple(milliseconds), estimated, whole)


def _corpus(folder: Path, vocab_size: int, seq_len: int) -> str:
    """The prefix of random tokens enough for all steps."""
    ids = np.random.default_rng(0).integers(0, vocab_size, max(1 << 16, 8 * seq_len)).astype(np.int64)
    work = folder / "work"
    work.mkdir()
    writer = CorpusWriter(work, "part", vocab_size)
    writer.append(ids, np.array([len(ids)]), 0, Counts(1, len(ids), len(ids), len(ids), int(ids.max())))
    writer.finish(str(folder / "random"), b"{}", "0" * 64, None, {})
    writer.close()
    return str(folder / "random")


def _train(folder: Path, config, plan, corpus: str) -> tuple[float, str]:
    """The median seconds of a step, and the device."""
    layout = plan.best.layout
    settings = ds_config(_STAGE, "none", layout.precision)
    settings["train_micro_batch_size_per_gpu"] = settings["train_batch_size"] = layout.micro_batch
    settings["gradient_accumulation_steps"] = 1
    file, run_dir = folder / "ds_config.json", folder / f"run{config.n_layer}"
    file.write_text(json.dumps(settings), encoding="utf-8")
    words = ["--ds_config", file, "--model", plan.settings.model, "--data", corpus, "--run_dir", run_dir]
    for name in ("n_layer", "d_model", "n_head", "d_ff", "seq_len", "vocab_size", "activation_checkpointing"):
        words += [f"--{name}", getattr(config, name)]
    words += ["--dropout", config.resid_dropout, "--max_steps", 10**6, "--save_interval", 0, "--log_interval", 1]
    log = run_dir.with_suffix(".log")
    with open(log, "wb") as output:
        command = [sys.executable, str(HOME / "train.py"), *map(str, words)]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        seconds = _steps(run_dir / "metrics.jsonl", process)
    finally:
        process.kill()  # it is to write no checkpoint
        process.wait()
    if seconds is None:
        told = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise ConfigError(f"--measure: training does not run on this machine: {told[-1][:300]}")
    return statistics.median(seconds[WARM:]), _device(run_dir)


def _steps(metrics: Path, process: subprocess.Popen) -> list[float] | None:
    """Seconds of each step, once there are enough; None where the process has ended before, or takes too long."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        found = []
        if metrics.exists():
            for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n") and "step_ms" in (record := json.loads(line)):
                    found.append(record["step_ms"] / 1e3)
        if len(found) >= WARM + TIMED:
            return found[: WARM + TIMED]
        if ended:
            return None
        time.sleep(0.2)
    return None


def _device(run_dir: Path) -> str:
    """The GPU that run.json names, or the CPU's cores."""
    try:
        found = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["device"]
        return found["gpus"][0] if found["gpus"] else f"{found['cpu_cores']} {_CPU}"
    except (OSError, ValueError, LookupError, TypeError):
        return "this machine"
