"""The DeepSpeed engine: how it is started, built and asked. The only module of training that imports DeepSpeed.

DeepSpeed is imported inside functions: it takes seconds, and every mistake a user can make in flags, settings and data
is reported before.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from megagpt.config.deepspeed import ResolvedConfig
from megagpt.dist import World, gather_json
from megagpt.dist.devices import own_gpu, refuse_idle
from megagpt.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def import_deepspeed() -> ModuleType:
    """DeepSpeed, told which device to use and kept from printing what a user need not read."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The logger prints dozens of lines a start; its handlers exist only after the import, so the level is set by name.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("MEGAGPT_DEEPSPEED_LOG", "WARNING"))
    return deepspeed


def device_of(world: World) -> torch.device:
    """The device of this rank. Raises ConfigError where there are fewer GPUs than ranks."""
    if not torch.cuda.is_available():
        _share_cores(world)
        return torch.device("cpu")
    refuse_idle(world, torch.cuda.device_count())
    return torch.device("cuda", own_gpu(world))


def make_deterministic() -> None:
    """From here on every operation gives the same bits in every run, or raises where it has no such form."""
    # cuBLAS reads it when it starts: without workspaces of its own, what streams share decides the order of sums.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging only, and it costs time
    torch.backends.cudnn.benchmark = False


def _share_cores(world: World) -> None:
    """Give each rank of this machine its part of the cores: by default every one would start a thread on each."""
    if "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world.local_world_size))


def start_distributed(timeout_minutes: float, meet: Callable[[], object] = lambda: None) -> None:
    """Start the process group over which DeepSpeed communicates: gloo on CPUs, NCCL on GPUs.

    ``meet`` gives the store in which the ranks have met, or None to find each other by torch's variables.
    """
    deepspeed = import_deepspeed()
    if not torch.cuda.is_available():
        # On a CPU DeepSpeed compiles a shared-memory all-reduce at every first start, hangs for ever on a lock that a
        # killed build left behind, and leaves 69 MB a rank in /dev/shm. (`import deepspeed.comm.torch` gives another
        # module, hence sys.modules.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = meet()
    if store is not None:
        _start_in(store, backend, timeout)
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=timeout,
        verbose=False,
    )
    # ZeRO's collectives go over groups that DeepSpeed makes without a timeout: torch's own of half an hour would hold.
    deepspeed.comm.comm.cdb.new_group = partial(torch.distributed.new_group, timeout=timeout)


def _start_in(store, backend: str, timeout: timedelta) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # As DeepSpeed would: NCCL is then set up at once, and not in the middle of the first step. Some releases of torch
    # hang on it (pytorch issue 153960).
    bound = backend == "nccl" and not "2.6.0" < torch.__version__ < "2.7.1"
    device = {"device_id": torch.device("cuda", torch.cuda.current_device())} if bound else {}
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **device
    )


def stop_distributed() -> None:
    """Leave the process group together, so that no rank sees its peers vanish while it still works."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@contextmanager
def sharded_construction(config: ResolvedConfig):
    """Under ZeRO-3 each module's parameters are split over the ranks as soon as the module is constructed."""
    if config.zero_stage < 3:
        yield
        return
    with import_deepspeed().zero.Init(config_dict_or_path=config.config):
        yield


def adam_class(device: torch.device, offloaded: bool) -> type | str:
    """DeepSpeed's compiled Adam for where the optimiser states live, or the reason why it is not used."""
    if device.type == "cpu":
        return "on CPUs torch's own is used, which needs no compiler"
    import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    builder = CPUAdamBuilder() if offloaded else FusedAdamBuilder()
    try:
        builder.load(verbose=False)
    except Exception as error:  # a compiler, nvcc or ninja is missing or fails, each with an exception of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{builder.name} does not build: {reason}"
    return DeepSpeedCPUAdam if offloaded else FusedAdam


def agreed(mine: type | str) -> type | str:
    """What all ranks use: ``mine``, or where any rank has a reason not to, that of the first one.

    A host without a compiler would otherwise step its shard by another implementation than the others do theirs, and no
    rank could load the other kind's states. Every rank calls this; on CPUs none has anything else.
    """
    if not torch.cuda.is_available():
        return mine
    reasons = gather_json(f"{socket.gethostname()}: {mine}" if isinstance(mine, str) else None)
    return next(filter(None, reasons), mine)


def buildable_operations() -> tuple[str, dict[str, str | None]]:
    """DeepSpeed's version, and of its operations that a run may want the reason why each does not build, or None."""
    version = import_deepspeed().__version__
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder, FusedAdamBuilder, QuantizerBuilder

    wanted = {
        "fused_adam": FusedAdamBuilder,
        "cpu_adam (offload)": CPUAdamBuilder,
        "async_io (nvme)": AsyncIOBuilder,
        "quantizer (ZeRO++)": QuantizerBuilder,
    }
    return version, {name: _why_not_built(builder()) for name, builder in wanted.items()}


def _why_not_built(builder) -> str | None:
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder, installed_cuda_version
    from torch.utils.cpp_extension import verify_ninja_availability

    if builder.NAME == "deepspeed_not_implemented":
        return "it needs a GPU"
    try:
        if not builder.is_compatible(verbose=False):
            return (builder.error_log or "what it needs is not installed").strip().splitlines()[0]
        verify_ninja_availability()
        if isinstance(builder, CUDAOpBuilder) and torch.cuda.is_available() and builder.NAME != "async_io":
            installed_cuda_version()
    except Exception as error:  # each builder raises what it likes
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def check_async_io(config: ResolvedConfig) -> None:
    """Raise ConfigError where offload to NVMe is asked for and DeepSpeed's asynchronous I/O cannot be built."""
    if "nvme" not in (config.offload_optimizer, config.offload_param):
        return
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            f"{config.path}: offload to nvme needs libaio with its headers (Debian: libaio-dev) and a C++ compiler; "
            "install them or use ds_configs/zero3_offload.json"
        )


def build_engine(model: nn.Module, optimizer: torch.optim.Optimizer, config: ResolvedConfig):
    """The DeepSpeed engine over ``model`` and ``optimizer``; ``config.config`` has no "auto" left in it."""
    settings = dict(config.config)
    if is_unsharded_fp32(config):
        settings["gradient_clipping"] = 0.0  # megagpt.train.optim.GuardedStep clips, and keeps the norm
    engine, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    # With the monitor on, the engine itself writes and flushes the rate at every step; the run's log does it instead.
    engine.monitor.enabled = False
    if engine.dp_world_size == 1 and config.zero_stage == 0:
        # Alone, the all-reduce is two copies of every gradient.
        engine.enable_backward_allreduce = False
    return engine


def backward(engine, loss: Tensor) -> None:
    """Add the gradients of a micro-batch's mean ``loss`` to those of the global batch's mean loss."""
    if engine.fp16_enabled() and not engine.zero_optimization():
        # DeepSpeed 0.19 takes the loss scale out of these gradients and forgets to put it in (its pull request 8393).
        loss = loss * engine.optimizer.loss_scale
    engine.backward(loss)


def is_unsharded_fp32(config: ResolvedConfig) -> bool:
    """True where DeepSpeed steps the plain optimiser, without the finite check and norm that its own wrappers have."""
    return config.zero_stage == 0 and config.precision == "fp32"


def grad_norm(engine) -> float | None:
    """The global norm of the last update's gradients before clipping, or None where the engine has not computed it."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return None
    # Without ZeRO and its own Adam, DeepSpeed leaves the loss scale in the norm.
    scaled = type(engine.optimizer).__name__ == "FP16_UnfusedOptimizer"
    return float(norm) / (engine.optimizer.loss_scale if scaled else 1.0)


def loss_scale(engine) -> float | None:
    """The current fp16 loss scale, or None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a scalar over all ranks (in place)."""
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


@contextmanager
def full_parameters(parameters: list[Tensor], config: ResolvedConfig, *, modify: bool = False):
    """Inside, the parameters are whole on every rank; with ``modify`` rank 0's changes are kept.

    Only ZeRO-3 splits them; elsewhere nothing happens.
    """
    if config.zero_stage < 3:
        yield
        return
    gathered = import_deepspeed().zero.GatheredParameters
    with gathered(parameters, modifier_rank=0 if modify else None):
        yield


def full_fp32(engine, parameter: Tensor, config: ResolvedConfig) -> Tensor | None:
    """A trained parameter in float32 as the optimiser keeps it, whole, on rank 0's CPU; None on the others.

    Every rank calls this, for ZeRO has a part of it on each.
    """
    if config.precision == "fp32":
        with full_parameters([parameter], config):
            return parameter.detach().float().cpu().clone() if torch.distributed.get_rank() == 0 else None
    if config.zero_stage == 0:
        value = _unsharded_master(engine.optimizer, parameter)
    else:
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
    return value.detach().cpu().clone() if torch.distributed.get_rank() == 0 else None


def replicated(engine, config: ResolvedConfig) -> dict[str, Tensor]:
    """What every rank should hold alike, by name: parameters, buffers, and float32 copies that are not sharded."""
    named = {**dict(engine.module.named_parameters()), **dict(engine.module.named_buffers())}
    if config.zero_stage or config.precision == "fp32":
        return named
    flat = getattr(engine.optimizer, "fp32_groups_flat", None)
    groups = engine.optimizer.fp32_groups if flat is None else [[tensor] for tensor in flat]
    return named | {f"float32 copy {i}.{j}": t for i, group in enumerate(groups) for j, t in enumerate(group)}


def _unsharded_master(optimizer, parameter: Tensor) -> Tensor:
    """The float32 copy that DeepSpeed's unsharded 16-bit optimisers keep of ``parameter``.

    They keep a list for each group or, under DeepSpeed's own Adam, one tensor with all of the group behind each other.
    """
    flat = getattr(optimizer, "fp32_groups_flat", None)
    for i, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for j, ours in enumerate(group):
            if ours is parameter:
                return optimizer.fp32_groups[i][j] if flat is None else flat[i][offset:][: ours.numel()].view_as(ours)
            offset += ours.numel()
    raise AssertionError("a parameter that is trained is in no group of the optimiser")
