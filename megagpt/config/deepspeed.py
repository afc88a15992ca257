"""From a DeepSpeed file, the flags and the number of ranks to the dict that ``deepspeed.initialize`` takes.

The file owns batch, accumulation, clipping, precision and ZeRO. A key that is absent or "auto" takes the flag's value;
a key and a flag that disagree are an error, and all of them are told at once.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megagpt.config import batch, schema, source
from megagpt.config.fields import TrainSettings
from megagpt.config.kinds import AUTO
from megagpt.config.zero import fill_auto, offload_device
from megagpt.config.zero import problems as zero_problems
from megagpt.errors import ConfigError

_BATCH_KEYS = {  # DeepSpeed's key: our flag
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "global_batch_size",
}
# DeepSpeed's Adam decouples the decay as well, unless adam_w_mode says otherwise.
_OPTIMIZER_TYPES = {"adam": "adamw", "adamw": "adamw", "openai_adam": "openai_adam", "apex": "apex"}


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
    optimizer_section: dict | None  # {"type": "adamw", "lr": ...}: what file and flags say; None without one


def load(path: str) -> dict:
    """The DeepSpeed file at ``path`` (JSON, HJSON, or base64 of one), its keys and types checked.

    Raises ConfigError that lists everything wrong with it.
    """
    raw = source.read(path)
    _refuse(schema.problems(raw), path)
    return raw


def _refuse(problems: Iterable[str], path: str) -> None:
    told = "; ".join(problems)
    if told:
        raise ConfigError(f"{source.name_of(path)}: {told}")


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
    _refuse(schema.problems(raw), path)
    config = schema.tidy(raw)
    zero = config.setdefault("zero_optimization", {})
    problems: list[str] = []
    numbers = _batch(config, settings, world_size, default_global_batch, problems)
    precision = _precision(config, settings, problems)
    fill_auto(zero, hidden_size)
    problems += zero_problems(config, world_size)
    section = config.pop("optimizer", None)
    optimizer = None if section is None else _optimizer(section, settings, problems)
    _refuse(problems, path)
    if config.get("gradient_clipping", AUTO) == AUTO:
        config["gradient_clipping"] = 1.0  # as GPT-1 was trained, and DeepSpeed's own default
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
        offload_optimizer=offload_device(zero, "offload_optimizer"),
        offload_param=offload_device(zero, "offload_param"),
        optimizer_section=optimizer,
    )


def check_hardware(resolved: ResolvedConfig, device_type: str, capability: tuple[int, int] | None = None) -> None:
    """Raise ConfigError when this machine cannot do what is asked.

    ``device_type`` is "cpu" or "cuda", the latter with its compute ``capability``.
    """
    _refuse(_monitor_problems(resolved), resolved.path)
    if device_type == "cpu":
        _refuse(_cpu_problems(resolved), resolved.path)
    zero = resolved.config["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        folder = zero.get(section, {}).get("nvme_path", ".")
        if offload_device(zero, section) == "nvme" and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
            raise ConfigError(
                f"{resolved.path}: zero_optimization.{section}.nvme_path {schema.show(folder)} is no folder one can "
                "write to; name a folder on this machine's NVMe disk"
            )
    if resolved.precision == "bf16" and device_type == "cuda" and (capability or (8, 0)) < (8, 0):
        raise ConfigError(
            f"{resolved.path}: bf16 needs a GPU of compute capability 8.0 (A100) or newer, this one has "
            f"{capability[0]}.{capability[1]}; use fp16, as in ds_configs/zero{resolved.zero_stage}_fp16.json"
        )


def _monitor_problems(resolved: ResolvedConfig) -> Iterator[str]:
    """Services whose programs are no part of MegaGPT, and are not installed."""
    for section, package in (("wandb", "wandb"), ("comet", "comet_ml")):
        if resolved.config.get(section, {}).get("enabled") and importlib.util.find_spec(package) is None:
            yield f"{section} needs the package {package}: pip install {package}, or set {section}.enabled to false"


_QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")


def _cpu_problems(resolved: ResolvedConfig) -> Iterator[str]:
    """What needs a GPU, and what to use instead."""
    if resolved.precision == "fp16":
        yield "fp16 needs a GPU and none is visible; on a CPU use ds_configs/cpu.json, with --precision bf16 or fp32"
    if resolved.config.get("aio", {}).get("use_gds"):
        yield "aio.use_gds needs a GPU and none is visible; take the key out"
    if "nvme" in (resolved.offload_optimizer, resolved.offload_param):
        yield "offload to nvme needs a GPU and none is visible; on a CPU use ds_configs/cpu.json"
    if any(resolved.config["zero_optimization"].get(key) for key in _QUANTIZED):
        yield "ZeRO++ quantises on GPUs only and none is visible; on a CPU use ds_configs/cpu.json"
    if resolved.offload_optimizer and resolved.config["zero_force_ds_cpu_optimizer"]:
        yield "zero_force_ds_cpu_optimizer asks for DeepSpeed's own Adam, which is not used on CPUs; set it to false"


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
        why = batch.explain(micro, accumulation, total, world_size)
        problems.append(f'{why}; correct one of the numbers or set it to "auto"')
    return solved


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


def _optimizer(section: dict, settings: TrainSettings, problems: list[str]) -> dict:
    """The optimizer section joined with the flags; a number that neither gives is left out."""
    kind = section.get("type", "AdamW")
    name = _OPTIMIZER_TYPES.get(kind.lower())
    if name is None:
        problems.append(f"optimizer.type {schema.show(kind)} is not served; use AdamW, or --optimizer openai_adam")
    elif settings.optimizer not in (None, name):
        problems.append(_disagree(f"optimizer.type is {schema.show(kind)}", f"--optimizer is {settings.optimizer}"))
    joined = {"type": name} if "type" in section else {}
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
