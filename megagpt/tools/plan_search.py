"""Every way to cut a run that MegaGPT offers, with the memory and the time of each, and the best of them."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from megagpt.config import batch, source
from megagpt.config.zero import fill_auto
from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.tools.plan_hardware import Gpu
from megagpt.tools.plan_memory import MARGIN, RUNTIME, Layout, Memory, memory
from megagpt.tools.plan_time import StepTime, step_time
from megagpt.tools.plan_traffic import Collective, ZeroSizes, collectives, gathered_parameters
from megagpt.tools.slurm_script import HOME

OFFLOADS = {0: ("none",), 1: ("none",), 2: ("none", "optimizer"), 3: ("none", "all")}
CHECKPOINTING = (0, 2, 1)  # no block, every second, every one
_NEARLY = 1.02  # of the best time: what is simpler or smaller is taken within it


@dataclass(frozen=True)
class Job:
    """What is to be planned: the model, the hardware and the batch."""

    config: GPTConfig
    gpu: Gpu
    nodes: int
    gpus_per_node: int
    global_batch: int  # sequences
    precision: str
    runtime: float = RUNTIME  # bytes
    margin: float = MARGIN
    host_memory: float | None = None  # bytes of CPU memory of a node, as far as known
    correction: float = 1.0  # of the time of computation, measured

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Option:
    """One way to cut the run."""

    checkpointing: int
    layout: Layout
    memory: Memory
    fits: bool
    time: StepTime
    traffic: tuple[Collective, ...]
    mfu: float  # model FLOPs utilisation: of the peak, without what is recomputed

    @property
    def name(self) -> str:
        """ZeRO stage, what is offloaded and what is recomputed."""
        offload = {"none": "", "optimizer": ", optimizer in CPU memory", "all": ", all states in CPU memory"}
        again = {0: "", 1: ", every block recomputed"}.get(
            self.checkpointing, f", every {self.checkpointing}. block recomputed"
        )
        return f"ZeRO-{self.layout.stage}{offload[self.layout.offload]}{again}"


def legal_batches(global_batch: int, world_size: int) -> list[tuple[int, int]]:
    """Every pair of micro-batch and accumulation with this global batch. Raises ConfigError where there is none."""
    share, rest = divmod(global_batch, world_size)
    if rest or not share:
        raise ConfigError(
            f"--global_batch_size: {batch.explain(None, None, global_batch, world_size)}; give one of these"
        )
    return [(micro, share // micro) for micro in range(1, share + 1) if share % micro == 0]


def ds_config(stage: int, offload: str, precision: str) -> dict:
    """The shipped DeepSpeed file for a way to cut a run, as an object with its "auto"s."""
    name = {"optimizer": "zero2_offload", "all": "zero3_offload"}.get(offload)
    if precision == "fp32":
        raw = source.read(str(HOME / "ds_configs" / f"zero{stage}_bf16.json"))
        del raw["bf16"]
    else:
        raw = source.read(str(HOME / "ds_configs" / f"zero{stage}_{precision}.json"))
    if name:
        offloading = source.read(str(HOME / "ds_configs" / f"{name}.json"))
        section = raw["zero_optimization"]
        section.update({k: v for k, v in offloading["zero_optimization"].items() if k.startswith("offload_")})
        raw["zero_force_ds_cpu_optimizer"] = offloading["zero_force_ds_cpu_optimizer"]
    return raw


@functools.lru_cache(maxsize=32)
def zero_sizes(stage: int, offload: str, precision: str, d_model: int) -> tuple[ZeroSizes, bool]:
    """The sizes of that file's ZeRO section, and whether communication runs beside computation."""
    zero = ds_config(stage, offload, precision)["zero_optimization"]
    fill_auto(zero, d_model)
    return ZeroSizes.of(zero), bool(zero.get("overlap_comm", stage == 3))


def options(
    job: Job,
    *,
    stages: Iterable[int] = OFFLOADS,
    offloads: Iterable[str] = ("none", "optimizer", "all"),
    checkpointing: Iterable[int] = CHECKPOINTING,
    micro_batch: int | None = None,
) -> list[Option]:
    """One option for each stage, offload and choice of recomputation: the fastest micro-batch that fits, or else 1."""
    pairs = legal_batches(job.global_batch, job.world_size)
    if micro_batch is not None:
        pairs = [pair for pair in pairs if pair[0] == micro_batch]
        if not pairs:
            told = batch.explain(micro_batch, None, job.global_batch, job.world_size)
            raise ConfigError(f"--micro_batch_size {micro_batch}: {told}; give one of these")
    offloads = tuple(offloads)
    return [
        _best_batch(job, stage, offload, every, pairs)
        for stage in stages
        for offload in OFFLOADS[stage]
        if offload in offloads
        for every in checkpointing
    ]


def _best_batch(job: Job, stage: int, offload: str, every: int, pairs: list[tuple[int, int]]) -> Option:
    """The largest micro-batch that fits: a step then has the fewest collectives."""
    found = None
    for micro, accumulation in pairs:
        option = evaluate(job, stage, offload, every, micro, accumulation)
        if found is not None and not option.fits:
            break
        if found is None or option.time.total <= found.time.total * 1.0001:
            found = option
        if not option.fits:
            break
    return found


def evaluate(job: Job, stage: int, offload: str, every: int, micro: int, accumulation: int) -> Option:
    """Memory, traffic and time of one way."""
    config = replace(job.config, activation_checkpointing=every)
    sizes, overlap = zero_sizes(stage, offload, job.precision, config.d_model)
    layout = Layout(stage, offload, job.world_size, job.precision, micro, accumulation, sizes, overlap)
    whole_already = job.world_size == 1 and offload != "all"
    gathered = gathered_parameters(config, sizes) if stage == 3 and not whole_already else None
    used = memory(config, layout, gathered, runtime=job.runtime, margin=job.margin)
    traffic = collectives(config, stage, job.world_size, job.precision, accumulation, sizes)
    time = step_time(config, layout, traffic, job.gpu, job.nodes, job.correction)
    host_fits = job.host_memory is None or used.host * job.gpus_per_node <= job.host_memory
    flops = config.flops_per_token() * micro * accumulation * config.seq_len
    mfu = flops / (time.total * job.gpu.peak_in(job.precision))
    return Option(every, layout, used, used.peak <= job.gpu.memory and host_fits, time, tuple(traffic), mfu)


def recommend(found: list[Option]) -> Option | None:
    """Of those that fit the fastest; among those nearly as fast the lowest stage, then the least recomputation.

    Offload, which needs CPU memory that nobody has counted, only where nothing else fits.
    """
    fitting = [option for option in found if option.fits]
    fitting = [option for option in fitting if option.layout.offload == "none"] or fitting
    if not fitting:
        return None
    best = min(option.time.total for option in fitting)
    near = [option for option in fitting if option.time.total <= best * _NEARLY]
    return min(near, key=lambda o: (o.layout.stage, _share_recomputed(o), o.time.total))


def _share_recomputed(option: Option) -> float:
    return 1 / option.checkpointing if option.checkpointing else 0.0


def fitting_batches(job: Job, option: Option) -> Iterator[tuple[int, int]]:
    """The legal pairs of micro-batch and accumulation that fit beside the option's other choices."""
    layout = option.layout
    for micro, accumulation in legal_batches(job.global_batch, job.world_size):
        if not evaluate(job, layout.stage, layout.offload, option.checkpointing, micro, accumulation).fits:
            return
        yield micro, accumulation


def refuse(job: Job, found: list[Option], presets: dict[str, GPTConfig], **chosen) -> ConfigError:
    """Why nothing fits, and what would: more nodes, a larger GPU, or a smaller model of ``presets``.

    ``chosen`` are the stages, offloads and checkpointing that :func:`options` looked at.
    """

    least = min(found, key=lambda option: option.memory.peak)
    if least.memory.peak <= job.gpu.memory:
        needed = min(o.memory.host for o in found if o.memory.peak <= job.gpu.memory) * job.gpus_per_node
        return ConfigError(
            f"--host_memory_gb {job.host_memory / 1e9:g} is too little: the options that fit the GPUs need at least "
            f"{needed / 1e9:.0f} GB of CPU memory a node; take more nodes or nodes with more memory"
        )
    ways = []
    more = next(
        (n for n in (job.nodes * 2**i for i in range(1, 11)) if _fits_on(replace(job, nodes=n), **chosen)), None
    )
    if more is not None:
        ways.append(f"--nodes {more}")
    ways.append(f"a GPU with {least.memory.peak / 1e9:.0f} GB")
    smaller = [name for name, config in presets.items() if _fits_on(replace(job, config=config), **chosen)]
    smaller.sort(key=lambda name: presets[name].n_params())
    if smaller:
        ways.append(f"--model {smaller[-1]}, the largest that fits here")
    return ConfigError(
        f"the model ({job.config.n_params():,} parameters) fits under no option: the least is "
        f"{least.memory.peak / 1e9:.1f} GB a GPU, with {least.name} and a micro-batch of {least.layout.micro_batch}, "
        f"and there are {job.gpu.memory / 1e9:.0f} GB; what would fit: {'; or '.join(ways)}"
    )


def _fits_on(job: Job, **chosen) -> bool:
    """Whether any option fits with one sequence at a time."""
    job = replace(job, global_batch=job.world_size)
    return any(option.fits for option in options(job, **chosen, micro_batch=1))
