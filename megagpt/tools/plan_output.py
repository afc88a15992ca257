"""What ``megagpt plan`` writes: the DeepSpeed file of the recommended option, and the command that submits the run."""

import json
import shlex
from pathlib import Path

from megagpt.errors import ConfigError
from megagpt.tools.plan_search import Job, Option, ds_config

CONFIG, SCRIPT = "ds_config.json", "submit.sh"


def settled_config(option: Option) -> dict:
    """The DeepSpeed file with the batch written into it."""
    layout = option.layout
    config = ds_config(layout.stage, layout.offload, layout.precision)
    config["train_batch_size"] = layout.micro_batch * layout.accumulation * layout.world_size
    config["train_micro_batch_size_per_gpu"] = layout.micro_batch
    config["gradient_accumulation_steps"] = layout.accumulation
    return config


def train_flags(option: Option, settings, config_path: Path, steps: int, save_interval: int) -> list[str]:
    """The flags of ``train.py`` for the plan."""
    words = ["--ds_config", str(config_path), "--model", settings.model, "--data", settings.data]
    for name in ("n_layer", "d_model", "n_head", "d_ff", "seq_len", "vocab_size", "dropout"):
        value = getattr(settings, name)
        if value is not None:
            words += [f"--{name}", str(value)]
    if option.checkpointing:
        words += ["--activation_checkpointing", str(option.checkpointing)]
    return [*words, "--max_steps", str(steps), "--save_interval", str(save_interval), "--run_dir", settings.run_dir]


def command(job: Job, settings, flags: list[str]) -> list[str]:
    """The call of sbatch: its own flags come before the script and win over those in it."""
    return [
        "sbatch",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.gpus_per_node}",
        f"--gpus-per-node={job.gpus_per_node}",
        f"--time={settings.time}",
        "slurm/pretrain.sbatch",
        *flags,
    ]


def write(folder: Path, option: Option, words: list[str]) -> tuple[Path, Path]:
    """Write both files into ``folder``; their paths. Raises ConfigError where it cannot be written."""
    config, script = folder / CONFIG, folder / SCRIPT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(settled_config(option), indent=2) + "\n", encoding="utf-8")
        script.write_text(f"#!/bin/sh\n# From the repository, as megagpt plan wrote it.\nexec {shlex.join(words)}\n")
        script.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--output {folder}: cannot be written: {error.strerror}; choose another folder") from None
    return config, script
