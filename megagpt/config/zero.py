"""The ``zero_optimization`` section: its "auto" sizes, and the combinations that cannot run."""

from collections.abc import Iterator

from megagpt.config.kinds import AUTO

_NEEDS_ZERO = (
    ("fp16", "fp16_master_weights_and_grads"),
    ("bf16", "bf16_master_weights_and_grads"),
    ("bf16", "bf16_optimizer_states"),
)
_STAGE_3_ONLY = {  # key: value that asks for nothing
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
}


def fill_auto(zero: dict, hidden_size: int) -> None:
    """The "auto" sizes of ZeRO, in numbers of elements, as Hugging Face's integration fills them."""
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == AUTO})


def offload_device(zero: dict, section: str) -> str | None:
    """Where ``section`` (offload_optimizer or offload_param) puts things: cpu or nvme, None where they stay."""
    device = zero.get(section, {}).get("device", "none")
    return None if device == "none" else device


def problems(config: dict, world_size: int) -> Iterator[str]:
    """Combinations that DeepSpeed refuses late, with an exception that does not name the key, or silently ignores."""
    zero = config["zero_optimization"]
    stage = zero.get("stage", 0)
    for section, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        device = offload_device(zero, section)
        if device and stage < lowest:
            yield f"zero_optimization.{section} needs stage {lowest} or higher, not {stage}"
        if device == "nvme" and stage < 3:
            yield f"zero_optimization.{section} to nvme needs stage 3, not {stage}"
        if device == "nvme" and not zero[section].get("nvme_path"):
            yield f'zero_optimization.{section} to nvme needs "nvme_path", a folder on a local disk'
    if zero.get("offload_optimizer", {}).get("ratio", 1) < 1 and stage < 3:
        yield f"zero_optimization.offload_optimizer.ratio below 1 needs stage 3, not {stage}"
    for key, off in _STAGE_3_ONLY.items():
        if zero.get(key, off) != off and stage < 3:
            yield f"zero_optimization.{key} needs stage 3, not {stage}"
    shard = zero.get("zero_hpz_partition_size", 1)
    if world_size % shard:
        yield f"zero_optimization.zero_hpz_partition_size {shard} must divide the {world_size} ranks"
    for name, key in _NEEDS_ZERO:
        if config.get(name, {}).get(key) and not stage:
            yield f"{name}.{key} needs ZeRO stage 1, 2 or 3"
    bf16 = config.get("bf16", {})
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        yield "bf16.bf16_optimizer_states needs bf16.bf16_master_weights_and_grads"
