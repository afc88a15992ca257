"""The table of DeepSpeed's keys against DeepSpeed itself, and what gets through it against DeepSpeed's own checks."""

import copy
import os
from contextlib import suppress
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.config.deepspeed import resolve
from megagpt.config.fields import TrainSettings
from megagpt.config.schema import REFUSED, SCHEMA, problems
from megagpt.errors import ConfigError

os.environ.setdefault("DS_ACCELERATOR", "cpu")


class Recorder(dict):
    """A DeepSpeed file that notes which of its keys are asked for, in sections too."""

    asked: ClassVar[set[str]] = set()

    def __init__(self, values, prefix=""):
        super().__init__({k: Recorder(v, f"{prefix}{k}.") if isinstance(v, dict) else v for k, v in values.items()})
        self.prefix = prefix

    def __copy__(self):
        return self

    def _ask(self, key):
        self.asked.add(f"{self.prefix}{key}")

    def get(self, key, default=None):
        self._ask(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self._ask(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self._ask(key)
        return super().__contains__(key)

    def keys(self):
        return self


@pytest.fixture(scope="module")
def asked():
    """Every key that DeepSpeed's configuration looks at, sections that it reads by hand included."""
    from deepspeed.runtime.config import DeepSpeedConfig

    sections = ("aio", "autotuning", "checkpoint", "data_types", "flops_profiler", "optimizer", "timers")
    by_hand = {section: {} for section in sections}
    by_hand["checkpoint"] = {"writer": None, "parallel_write": {}}
    by_hand["optimizer"] = {"type": "AdamW", "params": {}}
    by_hand["timers"] = {"throughput": {}}
    Recorder.asked.clear()
    DeepSpeedConfig(Recorder({"train_batch_size": 1, **by_hand}))
    return set(Recorder.asked)


def known(prefix=""):
    """The keys of the table directly under a section, those that are refused with a reason included."""
    section = SCHEMA
    for name in filter(None, prefix.split(".")):
        section = section[name]
    refused = {name.removeprefix(prefix) for name in REFUSED if name.startswith(prefix)}
    return set(section) | {name for name in refused if "." not in name}


def directly_under(names, prefix):
    return {n.removeprefix(prefix) for n in names if n.startswith(prefix) and "." not in n.removeprefix(prefix)}


def test_every_key_that_deepspeed_reads_is_in_the_table(asked):
    assert directly_under(asked, "") <= known()


def test_the_table_has_no_key_that_deepspeed_does_not_read(asked):
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS

    read_elsewhere = {"sequence_parallel_size", "tensor_parallel", "expert_parallel", "weight_quantization"}
    assert known() <= directly_under(asked, "") | set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) | read_elsewhere


@pytest.mark.parametrize(
    "section",
    ["aio.", "autotuning.", "checkpoint.", "checkpoint.parallel_write.", "data_types.", "flops_profiler.", "timers."],
)
def test_sections_that_deepspeed_reads_by_hand_have_its_keys(asked, section):
    assert known(section) == directly_under(asked, section)


def test_what_deepspeed_has_removed_is_refused():
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS

    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)
    assert {f"zero_optimization.{key}" for key in _REMOVED_ZERO_CONFIG_KEYS} <= set(REFUSED)


def models():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization.": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer.": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param.": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.leaf_module.": DeepSpeedZeroLeafModuleConfig,
        "fp16.": DeepSpeedFP16Config,
        "bf16.": DeepSpeedBF16Config,
        "tensorboard.": TensorBoardConfig,
        "wandb.": WandbConfig,
        "csv_monitor.": CSVConfig,
        "comet.": CometConfig,
        "comms_logger.": CommsLoggerConfig,
        "timers.throughput.": DeepSpeedThroughputTimerConfig,
    }


def test_sections_that_are_models_in_deepspeed_have_their_fields():
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

    for section, model in models().items():
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert known(section) - set(_REMOVED_ZERO_CONFIG_KEYS) == names, section


def test_a_reason_ends_where_a_message_goes_on():
    for name, reason in REFUSED.items():
        assert not reason.endswith("."), name


# what gets through ----------------------------------------------------------------------------------------------

values = st.one_of(
    st.booleans(),
    st.integers(-2, 40),
    st.sampled_from(
        [10**8, 5e8, 2.0, 10**30, 0.5, -1.5, float("nan"), float("inf"), "auto", "cpu", "nvme", "fp16", "Warn", ""]
    ),
    st.lists(st.sampled_from(["a", 0.9, 0.95, None]), max_size=3),
)


@st.composite
def sections(draw, schema):
    """Mostly right: keys of the table, values of any kind, now and then a section in place of a value."""
    section = {}
    for key in draw(st.lists(st.sampled_from(sorted(schema)), unique=True, max_size=6)):
        nested = schema[key]
        if isinstance(nested, dict) and draw(st.integers(0, 9)):
            section[key] = draw(sections(nested))
        else:
            fitting = draw(st.lists(values, min_size=1, max_size=25))
            right = [value for value in fitting if not isinstance(nested, dict) and nested.fits(value)]
            section[key] = (right or fitting)[0]
    return section


flags = st.fixed_dictionaries(
    {},
    optional={
        "micro_batch_size": st.integers(1, 40),
        "global_batch_size": st.integers(1, 40),
        "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
        "lr": st.sampled_from([1e-3, 0.5]),
        "optimizer": st.sampled_from(["adamw", "apex"]),
    },
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sections(SCHEMA), flags, st.integers(1, 9))
def test_any_file_is_refused_in_one_line_or_accepted_by_deepspeed_too(raw, chosen, ranks):
    from deepspeed.runtime.config import DeepSpeedConfig

    told = list(problems(raw))
    assert all("\n" not in line and len(line) < 600 for line in told)
    if told:
        return
    chosen = TrainSettings(ds_config="x", data=("a",), run_dir="r", **chosen)
    with suppress(ConfigError):
        config = resolve(raw, chosen, ranks, path="x", hidden_size=64, default_global_batch=8).config
        config.get("aio", {}).pop("use_gds", None)  # check_hardware refuses it where there is no GPU
        config["train_batch_size"] //= ranks  # without a process group DeepSpeed takes itself for the only rank
        DeepSpeedConfig(copy.deepcopy(config))


anything = st.recursive(
    values | st.text(max_size=8),
    lambda inner: st.dictionaries(st.text(max_size=8) | st.sampled_from(sorted(SCHEMA)), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(anything)
def test_any_object_gives_problems_or_none(raw):
    assert all(isinstance(line, str) for line in problems(raw if isinstance(raw, dict) else {"fp16": raw}))
