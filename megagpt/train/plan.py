"""What a run will do, settled and checked before torch is imported, a device touched or a file written."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megagpt import dist
from megagpt.config import deepspeed as ds
from megagpt.config.deepspeed import ResolvedConfig
from megagpt.config.fields import TrainSettings
from megagpt.config.presets import model_preset, training_preset
from megagpt.errors import CheckpointError, ConfigError
from megagpt.model.config import GPTConfig
from megagpt.train import manifest
from megagpt.train.corpus import Corpora, open_corpora
from megagpt.train.ranks import keep_global_batch
from megagpt.train.schedule import Schedule
from megagpt.train.zeroshot import Probe, open_probe

_DEFAULT_MODEL = "gpt1"
_SHAPE = ("n_layer", "d_model", "n_head", "d_ff", "seq_len", "vocab_size")
_DROPOUT = ("embd_dropout", "attn_dropout", "resid_dropout")
_MODEL_FLAGS = (*_DROPOUT, "embd_dropout_mode")
_OPTIMISER = ("optimizer", "lr", "min_lr", "warmup_steps", "schedule", "weight_decay", "betas", "eps")


@dataclass(frozen=True)
class Plan:
    """A run before it starts: every number decided, every corpus open."""

    settings: TrainSettings
    config: ResolvedConfig
    model: GPTConfig
    corpora: Corpora
    schedule: Schedule
    optimiser: dict  # name, lr, betas, eps, weight_decay
    init_weights: Path | None  # checkpoint folder or .safetensors file that the weights come from
    zeroshot: Probe | None = None  # what the model is asked on the way

    @property
    def model_name(self) -> str:
        return self.settings.model or (f"of {self.init_weights}" if self.init_weights else _DEFAULT_MODEL)

    @property
    def total_steps(self) -> int:
        return self.schedule.total

    @property
    def run_dir(self) -> Path:
        return Path(self.settings.run_dir)

    @property
    def root(self) -> Path:
        return self.run_dir / manifest.FOLDER

    @property
    def identity(self) -> dict:
        """What of the data a checkpoint records."""
        return self.corpora.identity

    def describe(self) -> dict:
        """The plan as plain data, for run.json."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.to_dict(),
            "n_params": self.model.n_params(),
            "optimiser": self.optimiser,
            "schedule": dataclasses.asdict(self.schedule),
            "batch": {
                "micro_batch": self.config.micro_batch,
                "accumulation": self.config.accumulation,
                "global_batch": self.config.global_batch,
            },
            "data": self.corpora.identity,
            "valid": {name: str(windows.dataset.prefix) for name, windows in self.corpora.valid.items()},
            "ds_config": self.config.config,
        }

    def summary(self) -> dict:
        """What summary.md says of the model, the data and the batch."""
        model, config = self.model, self.config
        return {
            "model": self.model_name,
            "n_params": model.n_params(),
            "shape": f"{model.n_layer} layers, width {model.d_model}, {model.n_head} heads, {model.seq_len} positions",
            "data": " ".join(self.settings.data),
            "data_tokens": sum(part.n_tokens for part in self.corpora.parts),
            "global_batch": config.global_batch,
            "ranks": config.world_size,
            "precision": config.precision,
            "zero_stage": config.zero_stage,
        }


def make_plan(settings: TrainSettings, raw: dict, world: dist.World) -> Plan:
    """Check flags, DeepSpeed file, corpora and model against each other.

    Raises ConfigError, DataError or, for weights to start from that cannot be used, CheckpointError.
    """
    if settings.resume not in ("auto", "never"):
        manifest.read_source(Path(settings.resume))  # the path is looked at before anything is written
    source = _source(settings)
    shape = _shape(settings, source.model if source else None)
    preset = training_preset(settings.model or _DEFAULT_MODEL)
    raw, settings = keep_global_batch(raw, settings, world.world_size)
    config = ds.resolve(
        raw,
        settings,
        world.world_size,
        path=settings.ds_config,
        hidden_size=shape["d_model"],
        default_global_batch=preset["global_batch_size"],
    )
    corpora = open_corpora(
        settings.blend(),
        settings.valid_sets(),
        seq_len=shape["seq_len"],
        sampler=settings.sampler,
        seed=settings.seed,
    )
    if settings.vocab_size is None and source is None and corpora.vocab_size is not None:
        shape["vocab_size"] = corpora.vocab_size
    model = GPTConfig(**shape)
    corpora.check_vocabulary(model.vocab_size)
    if source is not None:
        corpora.check_tokenizer(source.tokenizer_sha256, settings.init_from)
    optimiser = _optimiser(settings, config, preset)
    total = total_steps(settings, preset if source is None else {}, corpora, config.global_batch, model.seq_len)
    return Plan(
        settings=settings,
        config=config,
        model=model,
        corpora=corpora,
        schedule=_schedule(settings, optimiser, total),
        optimiser=optimiser,
        init_weights=Path(settings.init_from) if settings.init_from else None,
        zeroshot=open_probe(settings, corpora, model.seq_len),
    )


def _source(settings: TrainSettings) -> manifest.Source | None:
    """What the weights of --init_from are of."""
    if settings.init_from is None:
        return None
    path = Path(settings.init_from)
    source = manifest.read_decoder_source(path)
    try:
        n_params = GPTConfig.from_dict(source.model).n_params()
    except ConfigError as error:
        raise CheckpointError(f"{settings.init_from} does not say which model its weights are of: {error}") from None
    if path.suffix == ".safetensors":
        manifest.check_size(n_params, path, path.stat().st_size)
    return source


def _shape(settings: TrainSettings, source: dict | None) -> dict:
    """The fields of GPTConfig: the preset's or the source's, changed by flags."""
    shape = dict(source) if source is not None else model_preset(settings.model or _DEFAULT_MODEL)
    given = {name: getattr(settings, name) for name in _SHAPE if getattr(settings, name) is not None}
    if "d_model" in given:
        given.setdefault("d_ff", 4 * given["d_model"])
    if source is not None:
        _check_against_source(settings, source, given)
    shape.update(given)
    if settings.dropout is not None:
        shape.update(dict.fromkeys(_DROPOUT, settings.dropout))
    shape.update({name: getattr(settings, name) for name in _MODEL_FLAGS if getattr(settings, name) is not None})
    shape["activation_checkpointing"] = settings.activation_checkpointing
    return shape


def _check_against_source(settings: TrainSettings, source: dict, given: dict) -> None:
    """Raise ConfigError where flags ask for another shape than the weights have."""
    wanted = {} if settings.model is None else model_preset(settings.model)
    wanted.pop("vocab_size", None)  # a preset's vocabulary gives way to the corpus's, and so to the weights'
    wanted.update(given)
    differing = [
        f"{name} {wanted[name]} (the weights have {source[name]})"
        for name in (*_SHAPE, "norm")
        if name in wanted and wanted[name] != source[name]
    ]
    if differing:
        raise ConfigError(
            f"--init_from {settings.init_from} does not fit the model asked for: {', '.join(differing)}; "
            "leave those flags out, or train without --init_from"
        )


def _optimiser(settings: TrainSettings, config: ResolvedConfig, preset: dict) -> dict:
    """Name, rates, decay and schedule: the flags', else the DeepSpeed file's, else the preset's."""
    in_file = dict(config.optimizer_section or {})
    values = {name: preset[name] for name in _OPTIMISER}
    if "type" in in_file:
        values["optimizer"] = in_file.pop("type")
    values.update(in_file)
    values.update({name: getattr(settings, name) for name in _OPTIMISER if getattr(settings, name) is not None})
    values["betas"] = tuple(values["betas"])
    return values


def _schedule(settings: TrainSettings, optimiser: dict, total: int) -> Schedule:
    warmup = optimiser["warmup_steps"]
    if settings.warmup_steps is None:
        warmup = min(warmup, total // 10)  # the preset's is for the paper's length of training
    min_lr = min(optimiser["min_lr"], optimiser["lr"]) if settings.min_lr is None else optimiser["min_lr"]
    if min_lr > optimiser["lr"]:
        raise ConfigError(f"--min_lr {min_lr:g} is above the learning rate {optimiser['lr']:g}")
    return Schedule(optimiser["schedule"], total, warmup, floor=min_lr / optimiser["lr"])


def total_steps(settings: TrainSettings, preset: dict, corpora: Corpora, global_batch: int, seq_len: int) -> int:
    """Optimiser steps of the run, from whichever flag says how long it is, else from what was published for the model.

    Raises ConfigError when neither does.
    """
    names = ("max_steps", "max_tokens", "epochs")
    length = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    length = length or {name: preset[name] for name in names if name in preset}
    if not length:
        raise ConfigError("how long to train is not said: give --max_steps, --max_tokens or --epochs")
    ((name, value),) = length.items()
    if name == "max_steps":
        return value
    tokens = value if name == "max_tokens" else int(value * sum(part.n_tokens for part in corpora.parts))
    tokens_per_step = global_batch * seq_len
    if tokens < tokens_per_step:
        raise ConfigError(
            f"--{name} {value:,} is less than one step of {global_batch} x {seq_len} = {tokens_per_step:,} tokens; "
            "train longer or lower --global_batch_size"
        )
    return tokens // tokens_per_step
