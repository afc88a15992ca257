"""From a DeepSpeed file, the flags and the number of ranks to the dict that ``deepspeed.initialize`` takes.

The file owns batch, accumulation, clipping, precision and ZeRO. A key that is absent or "auto" takes the flag's value;
a key and a flag that disagree are an error, and all of them are told at once.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.config import batch, schema, source
from megagpt.config.fields import TrainSettings
from megagpt.config.schema import AUTO
from megagpt.errors import ConfigError

_BATCH_KEYS = {  # DeepSpeed's key: our flag
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
}
_OPTIMIZER_TYPES = {
    "adam": "adamw",
    "adamw": "adamw",
    "fusedadam": "apex",
    "openai_adam": "openai_adam",
    "apex": "apex",
}


@dataclass(frozen=True)
class ResolvedConfig:
    """What the file and the flags come to; ``config`` has no "auto" left."""

    path: str  # of the file, for messages
    config: dict  # for deepspeed.initialize: without optimizer and scheduler sections, which MegaGPT builds itself
    world_size: int
    micro_batch: int
    accumulation: int
    global_batch: int
    precision: str  # fp32, bf16 or fp16
    zero_stage: int
    gradient_clipping: float
    offload_optimizer: str | None  # cpu or nvme, where the optimiser states then live
    offload_param: str | None  # cpu or nvme
    optimizer_section: dict | None  # {"type": "adamw", "lr": ...}: what file and flags say; None without a section


def load(path: str) -> dict:
    """The DeepSpeed file at ``path`` (JSON, HJSON, or base64 of one), its keys and types checked.

    Raises ConfigError that lists everything wrong with it.
    """
    raw = source.read(path)
    problems = list(schema.problems(raw))
    if problems:
        raise ConfigError(f"{source.name_of(path)}: {'; '.join(problems)}")
    return raw


def resolve(
    raw: dict,
    settings: TrainSettings,
    world_size: int,
    *,
    path: str,
    hidden_size: int,
    default_global_batch: int | None = None,
) -> ResolvedConfig:
    """Join a loaded file with the flags for ``world_size`` ranks and a model of width ``hidden_size``.

    ``default_global_batch`` is used, rounded to a multiple of the ranks, where neither file nor flags say anything
    about the batch. Raises ConfigError that lists every disagreement.
    """
    config = copy.deepcopy(raw)
    problems: list[str] = []
    numbers = _batch(config, settings, world_size, default_global_batch, problems)
    precision = _precision(config, settings, problems)
    zero = config.setdefault("zero_optimization", {})
    _zero_auto(zero, hidden_size)
    problems += _zero_problems(config, zero, world_size)
    section = config.pop("optimizer", None)
    optimizer = None if section is None else _optimizer(section, settings, problems)
    if problems:
        raise ConfigError(f"{source.name_of(path)}: {'; '.join(problems)}")
    if config.get("gradient_clipping", AUTO) == AUTO:
        config["gradient_clipping"] = 1.0  # SPEC 6.2, and DeepSpeed's own default
    for key, number in zip(_BATCH_KEYS, numbers, strict=True):
        config[key] = number
    # The optimiser is built outside DeepSpeed, which then wants to be told that this is meant.
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    _monitors(config, settings.run_dir)
    return ResolvedConfig(
        path=source.name_of(path),
        config=config,
        world_size=world_size,
        micro_batch=numbers.micro,
        accumulation=numbers.accumulation,
        global_batch=numbers.total,
        precision=precision,
        zero_stage=int(zero.get("stage", 0)),
        gradient_clipping=float(config["gradient_clipping"]),
        offload_optimizer=_offload(zero, "offload_optimizer"),
        offload_param=_offload(zero, "offload_param"),
        optimizer_section=optimizer,
    )


def check_hardware(resolved: ResolvedConfig, device_type: str, capability: tuple[int, int] | None = None) -> None:
    """Raise ConfigError when this machine cannot do what is asked.

    ``device_type`` is "cpu" or "cuda", the latter with its compute ``capability``.
    """
    zero = resolved.config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        folder = zero.get(section, {}).get("nvme_path", ".")
        if _offload(zero, section) == "nvme" and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise ConfigError(
                f"{resolved.path}: zero_optimization.{section}.nvme_path {schema.show(folder)} is no folder one can "
                "write to; name a folder on this machine's NVMe disk"
            )
    if resolved.precision == "fp16" and device_type == "cpu":
        raise ConfigError(
            f"{resolved.path}: fp16 needs a GPU and none is visible; on a CPU use ds_configs/cpu.json, "
            "with --precision bf16 or fp32"
        )
    if resolved.precision == "bf16" and device_type == "cuda" and (capability or (8, 0)) < (8, 0):
        raise ConfigError(
            f"{resolved.path}: bf16 needs a GPU of compute capability 8.0 (A100) or newer, this one has "
            f"{capability[0]}.{capability[1]}; use fp16, as in ds_configs/zero{resolved.zero_stage}_fp16.json"
        )


def _join(file_value: object, file_key: str, flag_value: object, flag: str, problems: list[str]) -> object:
    """The value that file and flag agree on; None where both leave it open."""
    if file_value is None or file_value == AUTO:
        return flag_value
    if flag_value is not None and flag_value != file_value:
        shown = " ".join(map(str, flag_value)) if isinstance(flag_value, list) else flag_value
        problems.append(_disagree(f"{file_key} is {schema.show(file_value)}", f"--{flag} is {shown}"))
    return file_value


def _disagree(file: str, flag: str) -> str:
    return f'{file} and {flag}; correct one of them or set the key to "auto"'


def _batch(
    config: dict, settings: TrainSettings, world_size: int, default: int | None, problems: list[str]
) -> batch.Batch | None:
    """Micro-batch, accumulation and global batch; None when they don't fit, which ``problems`` then tells."""
    known = len(problems)
    values = []
    for key, flag in _BATCH_KEYS.items():
        value = _join(config.get(key), key, getattr(settings, flag), flag, problems)
        if value is not None and value > batch.MOST:
            problems.append(f"{key} is {value:g}; more than {batch.MOST} sequences make no batch")
        values.append(None if value is None else int(value))
    if len(problems) > known:
        return None
    micro, accumulation, total = values
    if micro is None and total is None:
        if default is None:
            problems.append("nothing says how large a batch is; give --micro_batch_size or --global_batch_size")
            return None
        unit = world_size * (accumulation or 1)
        total = max(1, round(default / unit)) * unit
    solved = batch.solve(micro, accumulation, total, world_size)
    if solved is None:
        problems.append(_impossible_batch(micro, accumulation, total, world_size))
    return solved


def _impossible_batch(micro: int | None, accumulation: int | None, total: int, world_size: int) -> str:
    factors = [f"{micro} per rank" if micro else "", f"{accumulation} steps" if accumulation else ""]
    product = " x ".join([*filter(None, factors), f"{world_size} rank{'s' * (world_size != 1)}"])
    if micro and accumulation:
        found = f"is not {product} = {micro * accumulation * world_size}"
    else:
        found = f"is no multiple of {product}"
    nearest = ", ".join(
        f"{b.micro} x {b.accumulation} x {world_size} = {b.total}"
        for b in batch.nearest_valid(micro, accumulation, total, world_size)
    )
    return (
        f"train_batch_size {total} {found}; the nearest settings that fit (micro-batch x accumulation x ranks) are "
        f'{nearest}; correct one of the numbers or set it to "auto"'
    )


def _precision(config: dict, settings: TrainSettings, problems: list[str]) -> str:
    """The precision that "fp16.enabled", "bf16.enabled" and --precision come to, written back into ``config``."""
    enabled = {name: config.get(name, {}).get("enabled", AUTO) for name in ("fp16", "bf16")}
    named = [name for name, value in enabled.items() if value is True]
    if len(named) == 2:
        problems.append("fp16.enabled and bf16.enabled are both true; keep one of them")
    precision = named[0] if named else settings.precision or "fp32"
    if settings.precision not in (None, precision):
        problems.append(_disagree(f"{precision}.enabled is true", f"--precision is {settings.precision}"))
    if enabled.get(precision) is False:
        problems.append(_disagree(f"{precision}.enabled is false", f"--precision is {precision}"))
    for name in enabled:
        if name == precision:
            config.setdefault(name, {})["enabled"] = True
        elif name in config:
            config[name]["enabled"] = False
    return precision


def _zero_auto(zero: dict, hidden_size: int) -> None:
    """The "auto" sizes of ZeRO, in numbers of elements, as Hugging Face's integration fills them."""
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == AUTO})


def _offload(zero: dict, section: str) -> str | None:
    device = zero.get(section, {}).get("device", "none")
    return None if device == "none" else device


def _zero_problems(config: dict, zero: dict, world_size: int) -> Iterator[str]:
    """Combinations that DeepSpeed refuses late, or with an exception that does not name the key."""
    stage = zero.get("stage", 0)
    for section, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _offload(zero, section)
        if device and stage < lowest:
            yield f"zero_optimization.{section} needs stage {lowest} or higher, not {stage}"
        if device == "nvme" and stage < 3:
            yield f"zero_optimization.{section} to nvme needs stage 3, not {stage}"
        if device == "nvme" and not zero[section].get("nvme_path"):
            yield f'zero_optimization.{section} to nvme needs "nvme_path", a folder on a local disk'
    if zero.get("offload_optimizer", {}).get("ratio", 1) < 1 and stage < 3:
        yield f"zero_optimization.offload_optimizer.ratio below 1 needs stage 3, not {stage}"
    shard = zero.get("zero_hpz_partition_size", 1)
    if world_size % shard:
        yield f"zero_optimization.zero_hpz_partition_size {shard} must divide the {world_size} ranks"
    for name, key in _NEEDS_ZERO:
        if config.get(name, {}).get(key) and not stage:
            yield f"{name}.{key} needs ZeRO stage 1, 2 or 3"
    bf16 = config.get("bf16", {})
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads"


_NEEDS_ZERO = (
    ("fp16", "fp16_master_weights_and_grads"),
    ("bf16", "bf16_master_weights_and_grads"),
    ("bf16", "bf16_optimizer_states"),
)


def _optimizer(section: dict, settings: TrainSettings, problems: list[str]) -> dict:
    """The optimizer section joined with the flags; a number that neither gives is left out."""
    kind = section.get("type", "AdamW")
    name = _OPTIMIZER_TYPES.get(kind.lower())
    if name is None:
        problems.append(f"optimizer.type {schema.show(kind)} is not served; use AdamW, or --optimizer openai_adam")
    elif settings.optimizer not in (None, name):
        problems.append(_disagree(f"optimizer.type is {schema.show(kind)}", f"--optimizer is {settings.optimizer}"))
    joined = {"type": name}
    params = section.get("params", {})
    for key in ("lr", "betas", "eps", "weight_decay"):
        flag = getattr(settings, key)
        flag = list(flag) if isinstance(flag, tuple) else flag
        value = _join(params.get(key), f"optimizer.params.{key}", flag, key, problems)
        if value is not None:
            joined[key] = tuple(value) if key == "betas" else value
    return joined


def _monitors(config: dict, run_dir: str) -> None:
    """TensorBoard's events go to <run_dir>/tb unless the file says otherwise."""
    tensorboard = config.setdefault("tensorboard", {"enabled": True})
    for section, job_name in ((tensorboard, "tb"), (config.get("csv_monitor", {}), "csv")):
        if section.get("enabled"):
            section.setdefault("output_path", run_dir)
            section.setdefault("job_name", job_name)
