"""The keys of a DeepSpeed file: which there are, what each may hold, and which MegaGPT does not serve and why.

The table is written out, so that a typing mistake is found in milliseconds without importing DeepSpeed (which itself
ignores unknown keys at the top level); a test compares it with DeepSpeed's own models.
"""

import copy
import json
from collections.abc import Iterator

from megagpt.config.kinds import (
    AUTO,
    AUTO_SWITCH,
    BETAS,
    DTYPE,
    EVEN,
    NAMES,
    SWITCH,
    TABLE,
    TEXT,
    one_of,
    only,
    real,
    whole,
)
from megagpt.errors import nearest

_OFFLOAD = {
    "device": one_of("none", "cpu", "nvme"),
    "nvme_path": TEXT,
    "buffer_count": whole(),
    "pin_memory": SWITCH,
}
_FILES = {"enabled": SWITCH, "output_path": TEXT, "job_name": TEXT}

ZERO = {
    "stage": one_of(0, 1, 2, 3),
    "contiguous_gradients": SWITCH,
    "reduce_scatter": SWITCH,
    "reduce_bucket_size": whole(1, auto=True),
    "use_multi_rank_bucket_allreduce": SWITCH,
    "allgather_partitions": SWITCH,
    "allgather_bucket_size": EVEN,
    "overlap_comm": SWITCH,
    "compute_grad_norm": only(True, "the gradient norm is clipped and logged"),
    "load_from_fp32_weights": SWITCH,
    "offload_param": {**_OFFLOAD, "buffer_size": whole(), "max_in_cpu": whole()},
    "offload_optimizer": {
        **_OFFLOAD,
        "pipeline_read": SWITCH,
        "pipeline_write": SWITCH,
        "fast_init": SWITCH,
        "ratio": real(0, 1),
        "super_offload": SWITCH,
        "cpuadam_cores_perc": real(0, 1),
    },
    "sub_group_size": whole(),
    "stage3_prefetch_bucket_size": whole(auto=True),
    "stage3_param_persistence_threshold": whole(auto=True),
    "stage3_model_persistence_threshold": whole(),
    "stage3_max_live_parameters": whole(),
    "stage3_max_reuse_distance": whole(),
    "stage3_gather_16bit_weights_on_model_save": SWITCH,
    "stage3_module_granularity_threshold": whole(),
    "stage3_use_all_reduce_for_fetch_params": SWITCH,
    "stage3_allgather_sequential": SWITCH,
    "ignore_unused_parameters": SWITCH,
    "round_robin_gradients": SWITCH,
    "parameter_alignment": SWITCH,
    "zero_hpz_partition_size": whole(1),
    "zero_quantized_weights": SWITCH,
    "zero_quantized_nontrainable_weights": SWITCH,
    "zero_quantized_gradients": SWITCH,
    "memory_efficient_linear": SWITCH,
    "pipeline_loading_checkpoint": SWITCH,
    "override_module_apply": SWITCH,
    "log_trace_cache_warnings": SWITCH,
    "enable_sanity_checks": SWITCH,
    "leaf_module": {"classes": NAMES, "names": NAMES, "name_suffixes": NAMES},
}

SCHEMA = {
    "train_batch_size": whole(1, auto=True),
    "train_micro_batch_size_per_gpu": whole(1, auto=True),
    "gradient_accumulation_steps": whole(1, auto=True),
    "gradient_clipping": real(auto=True),
    "zero_optimization": ZERO,
    "fp16": {
        "enabled": AUTO_SWITCH,
        "auto_cast": SWITCH,
        "loss_scale": real(),
        "initial_scale_power": whole(),
        "loss_scale_window": whole(1),
        "hysteresis": whole(1),
        "consecutive_hysteresis": SWITCH,
        "min_loss_scale": whole(1),
        "fp16_master_weights_and_grads": SWITCH,
    },
    "bf16": {
        "enabled": AUTO_SWITCH,
        "immediate_grad_update": SWITCH,
        "check_grad_overflow": SWITCH,
        "bf16_master_weights_and_grads": SWITCH,
        "bf16_optimizer_states": SWITCH,
    },
    "optimizer": {
        "type": TEXT,
        "params": {
            "lr": real(auto=True),
            "betas": BETAS,
            "eps": real(auto=True),
            "weight_decay": real(auto=True),
            "adam_w_mode": only(True, "weight decay is decoupled"),
        },
    },
    "communication_data_type": DTYPE,
    "data_types": {"grad_accum_dtype": DTYPE},
    "prescale_gradients": SWITCH,
    "gradient_predivide_factor": real(1e-9),
    "gradient_allreduce_op": one_of("mean"),
    "managed_gradient_accumulation": only(True, "the training loop counts on it"),
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "disable_allgather": SWITCH,
    "tensorboard": _FILES,
    "csv_monitor": _FILES,
    "wandb": {"enabled": SWITCH, "group": TEXT, "team": TEXT, "project": TEXT},
    "comet": {
        "enabled": SWITCH,
        "samples_log_interval": whole(1),
        "project": TEXT,
        "workspace": TEXT,
        "experiment_name": TEXT,
        "experiment_key": TEXT,
        "online": SWITCH,
        "mode": one_of("get", "create", "get_or_create"),
    },
    "flops_profiler": {
        "enabled": SWITCH,
        "recompute_fwd_factor": real(),
        "profile_step": whole(1),
        "module_depth": whole(-1),
        "top_modules": whole(1),
        "detailed": SWITCH,
        "output_file": TEXT,
    },
    "comms_logger": {"enabled": SWITCH, "verbose": SWITCH, "prof_all": SWITCH, "debug": SWITCH, "prof_ops": NAMES},
    "timers": {"throughput": {"enabled": SWITCH, "synchronized": SWITCH}},
    "steps_per_print": whole(1),
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
    "log_level": one_of("debug", "info", "warning", "error", "critical"),
    "disable_python_gc": SWITCH,
    "vocabulary_size": whole(1),
    "aio": {
        "block_size": whole(1),
        "queue_depth": whole(1),
        "intra_op_parallelism": whole(1),
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
        "use_gds": SWITCH,
    },
    "checkpoint": {
        "tag_validation": one_of("Ignore", "Warn", "Fail"),
        "parallel_write": {"pipeline_stage": SWITCH},
    },
    "autotuning": {  # read by the launcher
        "enabled": SWITCH,
        "fast": SWITCH,
        "results_dir": TEXT,
        "exps_dir": TEXT,
        "overwrite": SWITCH,
        "start_profile_step": whole(1),
        "end_profile_step": whole(1),
        "metric": one_of("throughput", "latency", "flops", "forward"),
        "metric_path": TEXT,
        "tuner_type": one_of("gridsearch", "random", "model_based"),
        "tuner_early_stopping": whole(),
        "tuner_num_trials": whole(),
        "arg_mappings": TABLE,
        "mp_size": whole(1),
        "num_tuning_micro_batch_sizes": whole(1),
        "max_train_batch_size": whole(1),
        "min_train_batch_size": whole(1),
        "max_train_micro_batch_size_per_gpu": whole(1),
        "min_train_micro_batch_size_per_gpu": whole(1),
        "model_info": {
            "profile": SWITCH,
            "num_params": whole(1),
            "hidden_size": whole(1),
            "num_layers": whole(1),
        },
        "model_info_path": TEXT,
    },
}

_REMOVED_KEYS = (  # names that DeepSpeed once knew
    "amp",
    "nebula",
    "compression_training",
    "quantize_training",
    "sparse_gradients",
    "sparse_attention",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
    "zero_optimization.mics_shard_size",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.zeropp_loco_param",
)
_PARALLEL = "MegaGPT splits data and optimiser states over ranks, not the model's layers; use ZeRO-3 for large models"
_OWN_FILES = "checkpoints are written and verified by MegaGPT itself; take the key out"

# Keys that DeepSpeed knows, or knew, and that would be ignored or break a run here, each with the way out.
REFUSED = {
    "scheduler": "the schedule is set by flags: --schedule, --warmup_steps, --min_lr, --max_steps",
    "activation_checkpointing": "use the flag --activation_checkpointing",
    "bfloat16": 'its name is "bf16"',
    "torch_autocast": 'use "bf16" or "fp16"',
    "dataloader_drop_last": "windows of the corpus fill every batch; take the key out",
    "data_types.param_dtype": 'use "bf16" or "fp16"',
    "data_types.buffer_dtype": "the model has no buffers; take the key out",
    "data_types.keep_in_fp32_modules": "the model has no such modules; take the key out",
    "optimizer.legacy_fusion": "MegaGPT chooses the implementation of the optimiser; take the key out",
    "optimizer.params.torch_adam": "MegaGPT chooses the implementation of the optimiser; take the key out",
    "comet.api_key": "set COMET_API_KEY in the environment: the file is copied into the run folder",
    "data_efficiency": "the order of the data is MegaGPT's: see --sampler",
    "compile": "the engine is not compiled; take the section out",
    "hybrid_engine": "it serves generation during reinforcement learning; take the section out",
    "weight_quantization": "it serves inference; take the section out",
    "tensor_parallel": _PARALLEL,
    "pipeline": _PARALLEL,
    "expert_parallel": _PARALLEL,
    "use_data_before_expert_parallelism": _PARALLEL,
    "sequence_parallel_size": _PARALLEL,
    "seq_parallel_communication_data_type": _PARALLEL,
    "datastates_ckpt": _OWN_FILES,
    "checkpoint.use_node_local_storage": _OWN_FILES,
    "checkpoint.checkpoint_serialization": _OWN_FILES,
    "checkpoint.writer": _OWN_FILES,
    "checkpoint.load_universal": _OWN_FILES,
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'write "pin_memory" inside "offload_optimizer"',
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        'its name is "stage3_gather_16bit_weights_on_model_save"'
    ),
    "zero_optimization.elastic_checkpoint": _OWN_FILES,
    "zero_optimization.legacy_stage1": "take the key out",
    "zero_optimization.zenflow": "MegaGPT does not serve it; use offload_optimizer alone",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "it belongs to another optimiser; take the key out",
    **dict.fromkeys(_REMOVED_KEYS, "DeepSpeed has removed it; take the key out"),
}


def tidy(section: dict, known: dict = SCHEMA) -> dict:
    """A copy of a section without problems, whole numbers as ints however they were written."""
    result = {}
    for key, value in section.items():
        kind = known[key]
        if isinstance(kind, dict):
            result[key] = tidy(value, kind)
        else:
            result[key] = int(value) if kind.whole and value != AUTO else copy.deepcopy(value)
    return result


def problems(section: dict, known: dict = SCHEMA, prefix: str = "") -> Iterator[str]:
    """What is wrong with the keys and values of a DeepSpeed file, one sentence each."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        if name in REFUSED:
            yield f"{show(name)} is not served: {REFUSED[name]}"
        elif key not in known:
            yield f"{show(name)} is no key of DeepSpeed's{nearest(key[:80], known)}"
        elif isinstance(known[key], dict):
            if isinstance(value, dict):
                yield from problems(value, known[key], f"{name}.")
            else:
                yield f"{show(name)} is {show(value)}; it must be an object in braces"
        elif not (known[key].fits(value) or (known[key].auto and value == AUTO)):
            auto = ' or "auto"' if known[key].auto else ""
            yield f"{show(name)} is {show(value)}; it must be {known[key].words}{auto}"


def show(value: object) -> str:
    """A value of the file as JSON has it, cut to a length that fits a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
