"""What a fine-tuning run will do, settled and checked before a device is touched or a file written."""

import dataclasses
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from megagpt import dist
from megagpt.config import deepspeed as ds
from megagpt.config.deepspeed import ResolvedConfig
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError
from megagpt.finetune import source
from megagpt.finetune.batches import Encoded, steps_per_epoch
from megagpt.finetune.examples import TaskData
from megagpt.finetune.fields import FinetuneSettings
from megagpt.finetune.heads import check_head
from megagpt.finetune.inputs import encode, load_data, read_tokenizer, text_rows, transform_for
from megagpt.finetune.recipes import Choices, Phase, Recipe, load_recipe
from megagpt.finetune.spec import TaskSpec
from megagpt.finetune.transforms import N_TASK_TOKENS
from megagpt.model.config import GPTConfig
from megagpt.train import manifest
from megagpt.train.ranks import keep_global_batch
from megagpt.train.schedule import Schedule

_BATCH = 32  # examples an update (Radford et al. 2018, section 4.1)
_DROPOUT = ("embd_dropout", "attn_dropout", "resid_dropout")
_OPTIMISER = {"optimizer": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
# ULMFiT's rates times the multiplier: its input dropout here is the embeddings', its hidden one the residual's.
_ARTICLE_RATES = {"embd_dropout": 0.4, "resid_dropout": 0.3, "head": 0.4}


@dataclass(frozen=True)
class PhasePlan:
    """A phase with its numbers: it begins at update ``first`` of the run and has ``steps``."""

    index: int
    phase: Phase
    first: int
    steps: int
    steps_per_epoch: int

    @property
    def end(self) -> int:
        return self.first + self.steps

    def schedule(self) -> Schedule:
        """Over this phase's updates."""
        warmup = self.phase.warmup * self.steps
        return Schedule(self.phase.schedule, self.steps, warmup, first=self.first)


@dataclass(frozen=True)
class FinetunePlan:
    """A run before it starts: every number decided, every example read and encoded."""

    settings: FinetuneSettings
    config: ResolvedConfig
    model: GPTConfig  # of the decoder with the task tokens' rows
    source_model: GPTConfig  # of the pre-trained weights
    data: TaskData
    spec: TaskSpec
    recipe: Recipe
    optimiser: dict
    tokenizer: Tokenizer
    tokenizer_path: Path
    phases: tuple[PhasePlan, ...]
    splits: dict[str, Encoded]  # every split of the task
    text: Encoded | None  # rows of the task's text, for a phase with the language model
    weights_identity: dict = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        return self.phases[-1].end

    @property
    def run_dir(self) -> Path:
        return Path(self.settings.run_dir)

    @property
    def root(self) -> Path:
        return self.run_dir / manifest.FOLDER

    @property
    def order(self) -> str:
        return self.settings.order or self.recipe.order

    @property
    def drop_short(self) -> bool:
        """Whether an epoch's last, short batch is left out: always but where texts are grouped by length.

        The statistics of a batch-norm need two examples on every rank.
        """
        return drop_short(self.order, self.spec.head)

    @property
    def n_transfer(self) -> int:
        """Blocks whose weights are the pre-trained ones; -1: nothing is."""
        n = _n_transfer(self.settings)
        return self.model.n_layer if n is None else n

    @cached_property
    def identity(self) -> dict:
        """What a checkpoint records, so that a resumed run is known to be of the same task, recipe and weights."""
        recipe = [{**dataclasses.asdict(p.phase), "steps": p.steps} for p in self.phases]
        identity = {
            **self.data.identity(),
            "tokenizer_sha256": self.tokenizer.sha256,
            "spec": self.spec.to_dict(),
            "phases": recipe,
            "order": self.order,
            "gradient_windows": self.settings.gradient_windows,
            "seed": self.settings.seed,
            "n_transfer": self.n_transfer,
            "init": self.weights_identity,
        }
        return json.loads(json.dumps(identity))

    def describe(self) -> dict:
        """The plan as plain data, for run.json."""
        settings = self.settings
        return {
            "task": self.data.task,
            "kind": self.data.kind,
            "labels": list(self.data.labels),
            "metrics": list(self.data.metrics),
            "recipe": self.recipe.name,
            "head": self.spec.head,
            "seed": settings.seed,
            "n_transfer": self.n_transfer,
            "from_scratch": settings.from_scratch,
            "limit_train": settings.limit_train,
            "lm_coef": max(p.phase.lm_coef for p in self.phases),
            "examples": {split.name: len(split) for split in self.data.splits()},
            "skipped": {s.name: {"rows": s.n_skipped, "first": s.skipped} for s in self.data.splits() if s.n_skipped},
            "phases": [{**dataclasses.asdict(p.phase), "first": p.first, "steps": p.steps} for p in self.phases],
            "spec": self.spec.to_dict(),
            "settings": dataclasses.asdict(settings),
            "model": self.model.to_dict(),
            "n_params": self.model.n_params(),
            "optimiser": self.optimiser,
            "batch": {
                "micro_batch": self.config.micro_batch,
                "accumulation": self.config.accumulation,
                "global_batch": self.config.global_batch,
            },
            "identity": self.identity,
            "ds_config": self.config.config,
        }


def drop_short(order: str, head: str) -> bool:
    return order != "grouped" or head == "pooled_mlp"


def _n_transfer(settings: FinetuneSettings) -> int | None:
    """Blocks to take over, None for all; -1: nothing is."""
    return -1 if settings.from_scratch else settings.n_transfer


def make_plan(settings: FinetuneSettings, raw: dict, world: dist.World) -> FinetunePlan:
    """Read and check flags, DeepSpeed file, weights, recipe and task against each other.

    Raises ConfigError, DataError or CheckpointError.
    """
    if settings.resume not in ("auto", "never"):
        manifest.read_source(Path(settings.resume))
    source_model, sha256 = source.read_source(settings.init_from, weights_taken=_n_transfer(settings) != -1)
    tokenizer_path, tokenizer = read_tokenizer(settings, sha256, source_model)
    recipe = load_recipe(settings.recipe, _choices(settings))
    model = _model(settings, source_model, recipe)
    raw, settings = keep_global_batch(raw, settings, world.world_size)
    config = ds.resolve(
        raw,
        settings,
        world.world_size,
        path=settings.ds_config,
        hidden_size=model.d_model,
        default_global_batch=_BATCH,
    )
    optimiser = _optimiser(settings, config)
    data = load_data(settings)
    spec = _spec(settings, recipe, data)
    transform = transform_for(spec, tokenizer, model)
    splits = {split.name: encode(split, spec, transform) for split in data.splits()}
    text = None
    if any(phase.objective == "lm" for phase in recipe.phases):
        text = text_rows(data, transform, model.seq_len)
    phases = _phases(recipe, settings, spec, splits["train"], text, config.global_batch)
    return FinetunePlan(
        settings=settings,
        config=config,
        model=model,
        source_model=source_model,
        data=data,
        spec=spec,
        recipe=recipe,
        optimiser=optimiser,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        phases=phases,
        splits=splits,
        text=text,
        weights_identity=source.identity(settings.init_from),
    )


def _choices(settings: FinetuneSettings) -> Choices:
    return Choices(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(Choices)})


def _multiplier(settings: FinetuneSettings, recipe: Recipe) -> float | None:
    return recipe.dropout_multiplier if settings.dropout_multiplier is None else settings.dropout_multiplier


def _model(settings: FinetuneSettings, source: GPTConfig, recipe: Recipe) -> GPTConfig:
    """The pre-trained model's shape with three rows more, and this run's dropout."""
    changes: dict = {"vocab_size": source.vocab_size + N_TASK_TOKENS}
    if (m := _multiplier(settings, recipe)) is not None:
        changes |= {name: m * _ARTICLE_RATES[name] for name in ("embd_dropout", "resid_dropout")}
    if settings.dropout is not None:
        changes |= dict.fromkeys(_DROPOUT, settings.dropout)
    if settings.seq_len is not None and settings.seq_len > source.seq_len:
        raise ConfigError(f"--seq_len {settings.seq_len} is more than the {source.seq_len} positions of the model")
    if settings.n_transfer is not None and settings.n_transfer > source.n_layer:
        raise ConfigError(f"--n_transfer {settings.n_transfer} is more than the model's {source.n_layer} blocks")
    return replace(source, **changes, activation_checkpointing=settings.activation_checkpointing)


def _optimiser(settings: FinetuneSettings, config: ResolvedConfig) -> dict:
    """Name, betas, eps and decay: the flags', else the DeepSpeed file's, else GPT-1's. Rates are the recipe's."""
    in_file = dict(config.optimizer_section or {})
    if settings.lr is None and in_file.pop("lr", None) is not None:
        raise ConfigError(
            f'{config.path}: optimizer.params.lr is the recipe\'s to say in fine-tuning; set it to "auto" and give --lr'
        )
    values = {**_OPTIMISER, **{{"type": "optimizer"}.get(k, k): v for k, v in in_file.items() if k != "lr"}}
    values |= {name: getattr(settings, name) for name in _OPTIMISER if getattr(settings, name) is not None}
    return {**values, "betas": tuple(values["betas"])}


def _spec(settings: FinetuneSettings, recipe: Recipe, data: TaskData) -> TaskSpec:
    head = settings.head or ("pooled_mlp" if settings.document_tokens else recipe.head)
    check_head(head)
    if settings.document_tokens and head != "pooled_mlp":
        raise ConfigError(f"--document_tokens needs a head that pools over windows, not {head}; use --head pooled_mlp")
    if head == "scalar_mix" and any(p.lm_coef for p in recipe.phases):
        raise ConfigError("--head scalar_mix goes without the auxiliary language model; add --lm_coef 0")
    dropout = settings.head_dropout
    if dropout is None:
        m = _multiplier(settings, recipe)
        dropout = 0.1 if m is None or head != "pooled_mlp" else m * _ARTICLE_RATES["head"]
    return TaskSpec.of(
        data, head=head, head_dropout=dropout, clean=settings.clean, document_tokens=settings.document_tokens,
        context=settings.seq_len,
    )  # fmt: skip


def _phases(recipe, settings, spec, train: Encoded, text: Encoded | None, batch: int) -> tuple[PhasePlan, ...]:
    plans, first = [], 0
    for i, phase in enumerate(recipe.phases):
        if phase.objective == "lm":
            per_epoch = steps_per_epoch(len(text), batch, False)
        else:
            per_epoch = steps_per_epoch(len(train), batch, drop_short(settings.order or recipe.order, spec.head))
        if not per_epoch:
            raise ConfigError(
                f"{len(train)} training examples are less than one batch of {batch}; lower --global_batch_size"
            )
        plans.append(PhasePlan(i, phase, first, phase.epochs * per_epoch, per_epoch))
        first = plans[-1].end
    return tuple(plans)
