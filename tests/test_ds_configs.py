"""Every shipped DeepSpeed file: strict JSON, resolved by MegaGPT, accepted by DeepSpeed's own configuration."""

import copy
import json
import os
import re
from pathlib import Path

import pytest

from megagpt.config.deepspeed import load, resolve
from megagpt.config.fields import TrainSettings

os.environ.setdefault("DS_ACCELERATOR", "cpu")

FOLDER = Path(__file__).parent.parent / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
EXPECTED = {  # name: (precision, ZeRO stage, where optimiser states live, where parameters live)
    "cpu": ("fp32", 1, None, None),
    **{f"zero{stage}_{kind}": (kind, stage, None, None) for stage in range(4) for kind in ("fp16", "bf16")},
    "zero2_offload": ("bf16", 2, "cpu", None),
    "zero3_offload": ("bf16", 3, "cpu", "cpu"),
    "zero3_nvme": ("bf16", 3, "nvme", "nvme"),
    "zeropp": ("bf16", 3, None, None),
}


def resolved(path, ranks, **flags):
    settings = TrainSettings(ds_config=str(path), data=("corpus",), run_dir="runs/x", **flags)
    return resolve(load(str(path)), settings, ranks, path=str(path), hidden_size=768, default_global_batch=64)


def test_every_purpose_has_its_file():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_strict_json(path):
    assert json.loads(path.read_text(encoding="utf-8")) == load(str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_what_its_name_says(path):
    config = resolved(path, 16)
    assert (config.precision, config.zero_stage, config.offload_optimizer, config.offload_param) == EXPECTED[path.stem]
    assert config.global_batch == 64
    assert config.gradient_clipping == 1.0
    assert '"auto"' not in json.dumps(config.config)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_batch_and_rates_are_left_to_the_flags(path):
    config = resolved(path, 8, micro_batch_size=2, gradient_accumulation_steps=3, lr=1e-3)
    assert (config.micro_batch, config.accumulation, config.global_batch) == (2, 3, 48)
    assert config.optimizer_section is None


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_accepts_a_file_and_reads_it_the_same_way(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    ours = resolved(path, 8)
    config = copy.deepcopy(ours.config)
    config["train_batch_size"] //= 8  # without a process group DeepSpeed takes itself for the only rank
    theirs = DeepSpeedConfig(config)
    assert theirs.zero_optimization_stage == ours.zero_stage
    assert theirs.float16_config.enabled == (ours.precision == "fp16")
    assert theirs.bfloat16_config.enabled == (ours.precision == "bf16")
    assert theirs.gradient_clipping == ours.gradient_clipping
    assert theirs.train_micro_batch_size_per_gpu == ours.micro_batch
    assert theirs.gradient_accumulation_steps == ours.accumulation
    for section, device in (("offload_optimizer", ours.offload_optimizer), ("offload_param", ours.offload_param)):
        offload = getattr(theirs.zero_config, section)
        assert (offload.device if offload else None) == device
    for key, value in ours.config["zero_optimization"].items():
        if not isinstance(value, dict):
            assert getattr(theirs.zero_config, key.removeprefix("stage3_")) == value, key


def test_the_table_of_the_folder_names_every_file():
    rows = [line for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    named = re.findall(r"`(\w+)\.json`", "".join(rows))
    assert set(named) == {path.stem for path in FILES}


def test_the_cpu_file_trains_in_bf16_on_request():
    assert resolved(FOLDER / "cpu.json", 2, precision="bf16").precision == "bf16"
    assert resolved(FOLDER / "cpu.json", 2).config["zero_force_ds_cpu_optimizer"] is False
