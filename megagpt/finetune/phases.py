"""The engine of a phase, over exactly the parameters that the phase trains."""

import copy
import dataclasses

import torch

from megagpt.finetune import weights
from megagpt.finetune.batches import TaskBatches, padding_share
from megagpt.finetune.model import Classifier
from megagpt.finetune.plan import FinetunePlan, PhasePlan
from megagpt.finetune.recipes import GROUPS, group_of
from megagpt.model.gpt import decays
from megagpt.ops import Ops
from megagpt.train import engine as deepspeed_engine
from megagpt.train import optim
from megagpt.train.batches import BatchPlan


def open_engine(
    plan: FinetunePlan, phase: PhasePlan, held: weights.Weights, ops: Ops, device: torch.device, *, monitored: bool
) -> tuple[object, list[float]]:
    """The engine of ``phase`` from the weights that rank 0 holds, and the highest rate of each of its groups."""
    config = plan.config
    with device, deepspeed_engine.sharded_construction(config):
        model = Classifier(plan.model, plan.spec, ops)
    weights.put(held, model, config)
    model.objective, model.lm_coef = phase.phase.objective, phase.phase.lm_coef
    groups = trainable_groups(model, plan, phase)
    optimizer = _optimizer(groups, plan, device)
    settings = copy.deepcopy(config.config)
    if not monitored:  # one engine a run has monitors
        for section in ("tensorboard", "wandb", "csv_monitor", "comet"):
            if section in settings:
                settings[section]["enabled"] = False
    engine = deepspeed_engine.build_engine(model, optimizer, dataclasses.replace(config, config=settings))
    weights.put_buffers(held, engine.module)
    return engine, [group["lr"] for group in groups]


def trainable_groups(model: Classifier, plan: FinetunePlan, phase: PhasePlan) -> list[dict]:
    """The optimiser's groups, named like upper/decay; every other parameter is told to need no gradient."""
    rates = phase.phase.rates()
    groups = []
    members = {group: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        group = group_of(name, plan.model.n_layer, phase.phase.objective)
        parameter.requires_grad_(group in rates)
        members[group].append((name, parameter))
    for group, rate in rates.items():
        groups += optim.parameter_groups(
            members[group], has_decay, lr=rate, weight_decay=plan.optimiser["weight_decay"], prefix=f"{group}/"
        )
    return groups


def has_decay(name: str) -> bool:
    """Every matrix decays; biases and the gains of normalisations don't."""
    return decays(name) and ".norm_" not in name


def _optimizer(groups: list[dict], plan: FinetunePlan, device: torch.device) -> torch.optim.Optimizer:
    config, settings = plan.config, plan.optimiser
    offloaded = config.offload_optimizer is not None
    optimizer, _ = optim.build_optimizer(
        settings["optimizer"],
        [dict(group) for group in groups],
        betas=settings["betas"],
        eps=settings["eps"],
        guarded=deepspeed_engine.is_unsharded_fp32(config),
        clip=config.gradient_clipping,
        compiled=lambda: deepspeed_engine.agreed(deepspeed_engine.adam_class(device, offloaded)),
    )
    return optimizer


def open_batches(plan: FinetunePlan, phase: PhasePlan, cut: BatchPlan, step: int, device: torch.device) -> TaskBatches:
    """The phase's micro-batches of the rank in ``cut``, from update ``step`` of the run on."""
    is_lm = phase.phase.objective == "lm"
    return TaskBatches(
        plan.text if is_lm else plan.splits["train"],
        cut,
        step - phase.first,
        device,
        order="shuffled" if is_lm else plan.order,
        seed=plan.settings.seed + phase.index,
        drop_short=not is_lm and plan.drop_short,
        gradient_windows=None if is_lm else plan.settings.gradient_windows,
    )


def padding_line(batches: TaskBatches) -> str:
    """How much of the first epoch is padding, were a global batch computed at once."""
    share = padding_share(batches._longest, batches.epoch(0))
    steps = batches.steps_per_epoch
    return f"{steps} updates an epoch; padding is {share:.1%} of the first one, and attention alone computes it"
