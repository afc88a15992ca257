"""From a DeepSpeed file and the flags to what deepspeed.initialize gets."""

import json
import subprocess
import sys

import pytest

from megagpt.config.deepspeed import check_hardware, load, resolve
from megagpt.config.fields import TrainSettings
from megagpt.errors import ConfigError

AUTO_BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)


def resolved(raw, *, ranks=2, hidden_size=128, default=None, **flags):
    flags = {"micro_batch_size": 4, **flags} if "train_batch_size" not in raw else flags
    settings = TrainSettings(ds_config="x.json", data=("corpus",), run_dir="runs/x", **flags)
    return resolve(raw, settings, ranks, path="x.json", hidden_size=hidden_size, default_global_batch=default)


def refused(raw, **kwargs):
    with pytest.raises(ConfigError) as caught:
        resolved(raw, **kwargs)
    text = str(caught.value)
    assert text.startswith("x.json: ")
    assert "\n" not in text
    return text


def test_flags_fill_what_the_file_leaves_to_them():
    result = resolved(AUTO_BATCH, micro_batch_size=4, gradient_accumulation_steps=3)
    assert (result.micro_batch, result.accumulation, result.global_batch) == (4, 3, 24)
    assert result.config["train_batch_size"] == 24
    assert result.gradient_clipping == result.config["gradient_clipping"] == 1.0


def test_an_absent_key_is_as_good_as_auto():
    assert resolved({}, micro_batch_size=4).config == resolved(AUTO_BATCH, micro_batch_size=4).config


def test_the_default_batch_is_rounded_to_the_ranks():
    assert resolved(AUTO_BATCH, ranks=3, default=64).global_batch == 63
    assert resolved(AUTO_BATCH, ranks=3, default=64, gradient_accumulation_steps=2).global_batch == 66
    assert resolved(AUTO_BATCH, ranks=100, default=64).global_batch == 100


def test_a_batch_that_nobody_gives_is_asked_for():
    assert "--micro_batch_size or --global_batch_size" in refused(AUTO_BATCH)


def test_an_impossible_batch_is_answered_with_the_nearest_three():
    raw = {"train_batch_size": 500, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 4}
    text = refused(raw, ranks=16)
    assert "train_batch_size 500 is not 8 per rank x 4 steps x 16 ranks = 512" in text
    assert "8 x 4 x 16 = 512, 7 x 4 x 16 = 448, 9 x 4 x 16 = 576" in text


def test_all_disagreements_are_told_in_one_message():
    raw = {
        "train_batch_size": 64,
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "auto"}},
        "zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}},
    }
    text = refused(raw, global_batch_size=32, precision="bf16", lr=3e-4, betas=(0.9, 0.999), optimizer="openai_adam")
    for part in (
        "train_batch_size is 64 and --global_batch_size is 32",
        "bf16.enabled is false and --precision is bf16",
        "optimizer.params.lr is 0.001 and --lr is 0.0003",
        "optimizer.params.betas is [0.9, 0.95] and --betas is 0.9 0.999",
        'optimizer.type is "AdamW" and --optimizer is openai_adam',
        "offload_param needs stage 3",
    ):
        assert part in text


def test_flags_that_repeat_the_file_are_no_disagreement():
    raw = {"train_batch_size": 64, "fp16": {"enabled": True}, "optimizer": {"params": {"lr": 1e-3}}}
    result = resolved(raw, global_batch_size=64, precision="fp16", lr=1e-3)
    assert (result.global_batch, result.precision) == (64, "fp16")


@pytest.mark.parametrize(
    ("raw", "flag", "expected"),
    [
        ({}, None, "fp32"),
        ({}, "bf16", "bf16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, None, "fp32"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "fp16", "fp16"),
        ({"fp16": {"loss_scale_window": 500}}, "fp16", "fp16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}, None, "bf16"),
        ({"bf16": {"enabled": False}}, "fp16", "fp16"),
        ({"bf16": {"enabled": False}}, "fp32", "fp32"),
    ],
    ids=str,
)
def test_precision_is_the_files_or_the_flags_or_fp32(raw, flag, expected):
    result = resolved(raw, precision=flag)
    assert result.precision == expected
    for name in ("fp16", "bf16"):
        assert result.config.get(name, {}).get("enabled", False) is (name == expected)


@pytest.mark.parametrize(
    ("raw", "flag", "part"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, None, "both true"),
        ({"bf16": {"enabled": True}}, "fp32", "bf16.enabled is true and --precision is fp32"),
        ({"fp16": {"enabled": False}}, "fp16", "fp16.enabled is false and --precision is fp16"),
    ],
    ids=str,
)
def test_precisions_that_disagree_are_refused(raw, flag, part):
    assert part in refused(raw, precision=flag)


def test_auto_sizes_of_zero_follow_the_width_of_the_model():
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    zero = resolved({"zero_optimization": {"stage": 3, **dict.fromkeys(names, "auto")}}, hidden_size=768).config
    assert [zero["zero_optimization"][name] for name in names] == [589_824, 530_841, 7_680]


def test_whole_numbers_may_be_written_with_an_exponent():
    zero = resolved({"train_batch_size": 8.0, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}).config
    assert json.dumps(zero["zero_optimization"]) == '{"stage": 1, "reduce_bucket_size": 500000000}'
    assert json.dumps(zero["train_batch_size"]) == "8"


def test_no_auto_is_left():
    raw = {
        **AUTO_BATCH,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
    }
    result = resolved(raw, micro_batch_size=1)
    assert '"auto"' not in json.dumps(result.config)
    assert result.optimizer_section == {"type": "adamw"}
    assert "optimizer" not in result.config
    assert raw["train_batch_size"] == "auto"  # the caller's file is left as it is


def test_the_optimizer_section_is_joined_with_the_flags():
    section = {"type": "Adam", "params": {"lr": "auto", "betas": [0.9, 0.95], "weight_decay": 0.1}}
    result = resolved({"optimizer": section}, lr=3e-4, eps=1e-6)
    assert result.optimizer_section == {
        "type": "adamw",
        "lr": 3e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
    }
    assert resolved({}).optimizer_section is None


def test_an_optimizer_that_is_not_there_is_refused():
    assert 'optimizer.type "Lamb" is not served' in refused({"optimizer": {"type": "Lamb"}})


def test_events_go_to_the_run_folder_unless_the_file_says_otherwise():
    assert resolved({}).config["tensorboard"] == {"enabled": True, "output_path": "runs/x", "job_name": "tb"}
    own = {"enabled": True, "output_path": "elsewhere", "job_name": "mine"}
    assert resolved({"tensorboard": own}).config["tensorboard"] == own
    assert resolved({"tensorboard": {"enabled": False}}).config["tensorboard"] == {"enabled": False}
    assert resolved({"csv_monitor": {"enabled": True}}).config["csv_monitor"]["output_path"] == "runs/x"


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "needs stage 1"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "to nvme needs stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, 'needs "nvme_path"'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio below 1"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "8 must divide the 2 ranks"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "zero_quantized_weights needs stage 3"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "needs ZeRO stage 1, 2 or 3"),
        ({"train_batch_size": 2**40}, "make no batch"),
    ],
    ids=str,
)
def test_combinations_that_cannot_run_are_refused(raw, part):
    assert part in refused(raw)


def test_fp16_on_a_cpu_is_answered_with_what_to_use():
    config = resolved({"fp16": {"enabled": True}})
    check_hardware(config, "cuda", (7, 0))
    with pytest.raises(
        ConfigError, match=r"^x\.json: fp16 needs a GPU .* use ds_configs/cpu\.json, with --precision bf16"
    ):
        check_hardware(config, "cpu")


def test_a_service_whose_package_is_not_installed_is_told_with_the_way_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_hardware(resolved({"wandb": {"enabled": False}}), "cpu")
    with pytest.raises(ConfigError, match=r"^x\.json: wandb needs the package wandb: pip install wandb.*comet_ml"):
        check_hardware(resolved({"wandb": {"enabled": True}, "comet": {"enabled": True}}), "cpu")


def test_reading_from_disk_into_a_gpu_needs_one():
    with pytest.raises(ConfigError, match=r"aio\.use_gds needs a GPU"):
        check_hardware(resolved({"aio": {"use_gds": True}}), "cpu")


def test_deepspeeds_own_cpu_optimizer_is_not_used_without_a_gpu():
    raw = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    check_hardware(resolved(raw), "cpu")
    with pytest.raises(ConfigError, match=r"zero_force_ds_cpu_optimizer .* set it to false"):
        check_hardware(resolved({**raw, "zero_force_ds_cpu_optimizer": True}), "cpu")


def test_bf16_on_an_old_gpu_is_answered_with_what_to_use():
    config = resolved({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    check_hardware(config, "cuda", (8, 0))
    check_hardware(config, "cpu")
    with pytest.raises(ConfigError, match=r"8\.0 \(A100\) or newer, this one has 7\.0; use fp16, as in .*zero2_fp16"):
        check_hardware(config, "cuda", (7, 0))


def test_an_nvme_folder_that_is_not_there_is_refused(tmp_path):
    def config(folder):
        section = {"device": "nvme", "nvme_path": str(folder)}
        return resolved({"zero_optimization": {"stage": 3, "offload_optimizer": section}})

    check_hardware(config(tmp_path), "cuda", (8, 0))
    with pytest.raises(ConfigError, match=r"offload_optimizer\.nvme_path .*gone.* is no folder"):
        check_hardware(config(tmp_path / "gone"), "cuda", (8, 0))


def test_no_mistake_in_a_file_needs_torch_to_be_found(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 3, "gradient_clipp1ng": 1}')
    code = f"""
import sys
from megagpt.config import deepspeed
from megagpt.config.fields import parse
from megagpt.errors import ConfigError
settings = parse(["--ds_config", {str(path)!r}, "--data", "x", "--run_dir", "r", "--micro_batch_size", "2"])
for attempt in (
    lambda: deepspeed.load(settings.ds_config),
    lambda: deepspeed.resolve({{"train_batch_size": 3}}, settings, 2, path="x", hidden_size=8),
):
    try:
        attempt()
    except ConfigError as error:
        print(error)
print(sorted({{"torch", "deepspeed", "numpy", "pydantic"}} & set(sys.modules)))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "gradient_clipp1ng" in shown
    assert "'gradient_clipping'" in shown
    assert "train_batch_size 3" in shown
    assert shown.endswith("[]\n")


def test_every_unknown_key_is_told_with_the_nearest(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipp1ng": 1, "zero_optimization": {"stagee": 1}, "scheduler": {}, "fp16": true}')
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    text = str(caught.value)
    for part in (
        "\"gradient_clipp1ng\" is no key of DeepSpeed's (did you mean 'gradient_clipping'?)",
        "\"zero_optimization.stagee\" is no key of DeepSpeed's (did you mean 'stage'?)",
        '"scheduler" is not served: the schedule is set by flags',
        '"fp16" is true; it must be an object in braces',
    ):
        assert part in text
