"""``megagpt plan`` says what DeepSpeed's engine then holds and sends: to the byte, on 1, 2 and 4 ranks."""

import functools
import os
from collections import Counter

import pytest
from distributed import run_ranks

from megagpt.config import deepspeed as ds
from megagpt.config.fields import TrainSettings
from megagpt.model.config import GPTConfig
from megagpt.tools.plan_states import FP32, model_states
from megagpt.tools.plan_traffic import ZeroSizes, collectives

# Odd numbers of elements, so that every layout has to pad.
SHAPE = {"vocab_size": 101, "seq_len": 14, "n_layer": 3, "n_head": 3, "d_model": 27}
SHAPE |= {"embd_dropout": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0}
SMALL = 16  # bytes: norms and flags
# Thresholds at which a model as small as this is gathered, released and fetched ahead as large ones are.
TIGHT = {
    "reduce_bucket_size": 4000,
    "stage3_param_persistence_threshold": 320,
    "stage3_prefetch_bucket_size": 2000,
    "stage3_max_reuse_distance": 30000,
}
CASES = [
    *(("bf16", stage, accumulation, {}, 0) for stage in range(4) for accumulation in (1, 4)),
    *(("fp32", stage, 1, {}, 0) for stage in (0, 2, 3)),
    *(("fp32", 3, 2, {**TIGHT, "stage3_max_reuse_distance": reuse}, 0) for reuse in (0, 30000)),
    *(("fp32", 3, 2, {**TIGHT, "stage3_prefetch_bucket_size": 0}, every) for every in (1, 2)),
]


def build(case):
    """An engine as a run builds it, its configuration and the model's."""
    import torch

    from megagpt.model.gpt import GPT, decays
    from megagpt.ops import load_ops
    from megagpt.train import engine, optim

    precision, stage, accumulation, zero, every = case
    raw = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": stage, **zero},
        "tensorboard": {"enabled": False},
    }
    settings = TrainSettings(ds_config="a file", data=("x",), run_dir="nowhere")
    world_size = int(os.environ["WORLD_SIZE"])
    config = ds.resolve(raw, settings, world_size, path="a file", hidden_size=SHAPE["d_model"])
    shape = GPTConfig(**SHAPE, activation_checkpointing=every)
    torch.manual_seed(0)
    with engine.sharded_construction(config):
        model = GPT(shape, load_ops("torch", head_width=shape.head_width, dtype=torch.float32, device="cpu"))
    optimizer, _ = optim.build_optimizer(
        "adamw",
        optim.parameter_groups(model.named_parameters(), decays, lr=1e-3, weight_decay=0.1),
        betas=(0.9, 0.95),
        eps=1e-8,
        guarded=engine.is_unsharded_fp32(config),
    )
    return engine.build_engine(model, optimizer, config), config, shape


def step(engine, shape, accumulation):
    import torch

    from megagpt.train.engine import backward

    for _ in range(accumulation):
        ids = torch.randint(shape.vocab_size, (1, shape.seq_len))
        backward(engine, engine(ids, ids))
        engine.step()


def nbytes(found):
    """Of a tensor, or of all tensors in lists of them."""
    return sum(map(nbytes, found)) if isinstance(found, list | tuple) else found.numel() * found.element_size()


def held(engine, stage):
    """Bytes of what the engine holds, by the names of model_states."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    moments = sum(nbytes([s["exp_avg"], s["exp_avg_sq"]]) for s in inner.state.values())
    names = {1: "bit16_groups_flat", 2: "bit16_groups_flat", 3: "lp_param_buffer"}
    parameters = list(engine.module.parameters()) if stage == 0 else getattr(optimizer, names[stage])
    names = {0: "fp32_groups", 1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
    master = getattr(optimizer, names.get(stage, "fp32_partitioned_groups_flat"), [])
    found = {"parameters": nbytes(parameters), "master": nbytes(master), "moments": moments}
    if stage == 3:
        found["gradients"] = nbytes(optimizer.grad_partitions_flat_buffer)
    return found


def counted(work):
    """Calls and bytes of the collectives within ``work``, by kind; a second counter for those of a few bytes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    kinds = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
    total, small = Counter(), Counter()

    def sizes(arg):
        if isinstance(arg, torch.Tensor):
            return nbytes(arg)
        return sum(map(sizes, arg)) if isinstance(arg, list | tuple) else 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            namespace, name, _ = str(func).split(".")
            if namespace == "c10d":
                size = max(map(sizes, args[:2]))
                (small if size <= SMALL else total)[kinds.get(name, name)] += size
            return func(*args, **(kwargs or {}))

    with Count():
        work()
    return total, small


def engine_figures(cases):
    """Of every case what the engine holds and what a step sends, on this rank."""
    from megagpt import dist
    from megagpt.train import engine as deepspeed_engine

    deepspeed_engine.device_of(dist.resolve_world(os.environ))
    deepspeed_engine.start_distributed(2)
    figures = []
    for case in cases:
        engine, config, shape = build(case)
        for _ in range(3):  # ZeRO-3 records the order of modules in two, and follows it from then on
            step(engine, shape, config.accumulation)
        total, small = counted(functools.partial(step, engine, shape, config.accumulation))
        n_params = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        figures.append((n_params, held(engine, case[1]), dict(total), dict(small)))
        engine.destroy()
    deepspeed_engine.stop_distributed()
    return figures


@functools.cache
def ranks_figures(world_size):
    """One launch for all cases of a number of ranks."""
    cases = CASES if world_size < 4 else CASES[:8]
    return [figures for figures, _ in run_ranks(engine_figures, world_size, cases, timeout=280)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_states_are_those_of_the_engine(world_size):
    for rank, figures in enumerate(ranks_figures(world_size)):
        for (precision, stage, accumulation, _, _), (n_params, found, _, _) in zip(CASES, figures, strict=False):
            shape = GPTConfig(**SHAPE)
            states = model_states(shape, stage, world_size, precision, rank=rank, accumulation=accumulation)
            assert n_params == shape.n_params()
            assert found == {name: getattr(states, name) for name in found}, (precision, stage, rank)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [2, 4])
def test_traffic_is_that_of_the_engine(world_size):
    for figures in ranks_figures(world_size):
        for case, (_, _, total, small) in zip(CASES, figures, strict=False):
            precision, stage, accumulation, zero, every = case
            section = {"reduce_bucket_size": 10**9, **zero}
            shape = GPTConfig(**SHAPE, activation_checkpointing=every)
            expected = Counter()
            for found in collectives(shape, stage, world_size, precision, accumulation, ZeroSizes.of(section)):
                expected[found.kind] += found.nbytes
            assert total == dict(expected), case
            assert sum(small.values()) <= 4 * SMALL, case


def test_each_group_is_filled_up_on_its_own():
    """Worked by hand for 4 ranks: multiples of 8 elements, of the matrices and of the biases and norms."""
    shape = GPTConfig(**SHAPE)
    matrices = (101 + 14) * 27 + 3 * 12 * 27 * 27
    others = 3 * (2 * 2 * 27 + 3 * 27 + 27 + 4 * 27 + 27) + 2 * 27
    assert matrices + others == shape.n_params()
    assert (matrices % 8, others % 8) == (5, 3)
    flat = matrices + 3 + others + 5
    states = model_states(shape, 1, 4, "bf16")
    assert states.parameters == 2 * flat
    assert states.master == flat // 4 * FP32
    assert states.moments == 2 * states.master
    assert states.gradients == 2 * shape.n_params()
