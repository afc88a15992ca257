"""Recipes: lists of phases, each of which trains some groups of parameters for some epochs.

``gpt1`` is Radford et al. 2018, section 4.1; ``ulmfit`` is Howard and Ruder 2018 on a decoder, with the numbers of the
articles that describe it; ``feature`` trains a head on a frozen decoder (ELMo's way). A JSON file describes any other.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megagpt.config import source
from megagpt.errors import ConfigError, nearest
from megagpt.finetune.batches import ORDERS
from megagpt.finetune.heads import check_head
from megagpt.train.schedule import SCHEDULES

GROUPS = ("embeddings", "lower", "middle", "upper", "head")  # blocks in thirds, from the embeddings up
DISCRIMINATION = 2.6  # a group's rate over that of the group below (Howard and Ruder 2018, section 3.2)
OBJECTIVES = ("task", "lm")


@dataclass(frozen=True)
class Phase:
    """What is trained for how long. Raises ConfigError for what cannot be."""

    name: str
    groups: tuple[str, ...] = GROUPS  # that are trained
    objective: str = "task"  # or lm: the language model on the task's text, without the head
    epochs: int = 1
    lr: float = 6.25e-5  # highest rate of the topmost group
    discrimination: float = 1.0  # each group's rate is the one above it divided by this
    schedule: str = "warmup_linear"  # over this phase's updates
    warmup: float = 0.0  # share of the updates; stlr has its own
    lm_coef: float = 0.0  # lambda of the auxiliary language model

    def __post_init__(self) -> None:
        for what, name, known in (
            *(("group", group, GROUPS) for group in self.groups),
            ("objective", self.objective, OBJECTIVES),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if name not in known:
                raise ConfigError(
                    f"phase {self.name}: {what} {name!r} is unknown{nearest(str(name), known)}; "
                    f"choose among {', '.join(known)}"
                )
        if self.objective == "lm" and "head" in self.groups:
            raise ConfigError(f"phase {self.name}: the language model has no head; leave it out of the groups")
        if not self.groups or self.epochs < 1:
            raise ConfigError(f"phase {self.name} trains nothing; it needs at least one group and one epoch")
        if not 0 < self.lr < 1e18 or not self.discrimination >= 1 or self.lm_coef < 0 or not 0 <= self.warmup < 1:
            raise ConfigError(
                f"phase {self.name}: lr {self.lr:g} must be above 0, discrimination {self.discrimination:g} at least "
                f"1, lm_coef {self.lm_coef:g} at least 0 and warmup {self.warmup:g} at least 0 and below 1"
            )

    def rates(self) -> dict[str, float]:
        """The highest rate of each trained group: lr / discrimination^(places below the topmost of all groups)."""
        top = len(GROUPS) - (2 if self.objective == "lm" else 1)
        return {g: self.lr / self.discrimination ** (top - GROUPS.index(g)) for g in GROUPS if g in self.groups}


@dataclass(frozen=True)
class Recipe:
    """Phases, and what goes with them where nothing else is asked for."""

    name: str
    phases: tuple[Phase, ...]
    head: str = "linear"
    order: str = "shuffled"
    dropout_multiplier: float | None = None  # of the article's rates; None: the decoder's own

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Choices:
    """What flags may change of a recipe; None leaves it."""

    epochs: int | None = None
    lm_epochs: int | None = None
    lr: float | None = None
    lm_coef: float | None = None
    warmup: float | None = None
    schedule: str | None = None


def gpt1(choices: Choices) -> Recipe:
    """All parameters at one rate with the auxiliary language model: 6.25e-5, 3 epochs, 0.2% warm-up, linear to 0."""
    phase = Phase(
        "all",
        epochs=_or(choices.epochs, 3),
        lr=_or(choices.lr, 6.25e-5),
        schedule=_or(choices.schedule, "warmup_linear"),
        warmup=_or(choices.warmup, 0.002),
        lm_coef=_or(choices.lm_coef, 0.5),
    )
    return Recipe("gpt1", (phase,))


def ulmfit(choices: Choices) -> Recipe:
    """The language model on the task's text, then the head, then one more group an epoch; slanted triangles.

    The epochs are those of the last stage; where they are more than the groups, all are trained in those left.
    """
    more = {"discrimination": DISCRIMINATION, "schedule": _or(choices.schedule, "stlr"), "lr": _or(choices.lr, 0.01)}
    phases = []
    if lm_epochs := _or(choices.lm_epochs, 1):
        phases.append(Phase("language model", GROUPS[:-1], "lm", lm_epochs, **more))
    epochs = _or(choices.epochs, len(GROUPS))
    more |= {"lm_coef": _or(choices.lm_coef, 0.0), "warmup": _or(choices.warmup, 0.0)}
    for e in range(min(epochs, len(GROUPS))):
        groups = GROUPS[len(GROUPS) - 1 - e :]
        left = epochs - e if e == len(GROUPS) - 1 else 1
        phases.append(Phase("head" if e == 0 else f"+{groups[0]}", groups, "task", left, **more))
    return Recipe("ulmfit", tuple(phases), head="pooled_mlp", order="grouped", dropout_multiplier=0.5)


def feature(choices: Choices) -> Recipe:
    """The head alone, on a frozen decoder's layers."""
    phase = Phase(
        "head",
        ("head",),
        epochs=_or(choices.epochs, 3),
        lr=_or(choices.lr, 1e-3),
        schedule=_or(choices.schedule, "warmup_linear"),
        warmup=_or(choices.warmup, 0.0),
        lm_coef=_or(choices.lm_coef, 0.0),
    )
    return Recipe("feature", (phase,), head="scalar_mix", order="grouped")


RECIPES: dict[str, Callable[[Choices], Recipe]] = {"gpt1": gpt1, "ulmfit": ulmfit, "feature": feature}


def load_recipe(name: str, choices: Choices) -> Recipe:
    """The recipe ``name``, or that of a JSON file. Raises ConfigError."""
    if name in RECIPES:
        return RECIPES[name](choices)
    if not (name.endswith((".json", ".hjson")) or Path(name).exists()):
        raise ConfigError(
            f"--recipe {name} is unknown{nearest(name, RECIPES)}; choose one of {', '.join(RECIPES)}, or a JSON file "
            "with phases"
        )
    given = [f"--{field.name}" for field in fields(Choices) if getattr(choices, field.name) is not None]
    if given:
        raise ConfigError(f"{' and '.join(given)} cannot be given beside {name}, whose phases say it; edit the file")
    return _from_file(name)


def _from_file(path: str) -> Recipe:
    """{"head": ..., "order": ..., "dropout_multiplier": ..., "phases": [{"name": ..., "groups": [...], ...}, ...]}"""
    raw = source.read(path)
    _refuse_unknown(path, raw, ("head", "order", "dropout_multiplier", "phases"))
    if not isinstance(raw.get("phases"), list) or not raw["phases"]:
        raise ConfigError(f'{path}: has no phases; it needs "phases": a list of at least one')
    if not isinstance(raw.get("head", ""), str):
        raise ConfigError(f"{path}: head {json.dumps(raw['head'])[:80]} is no name of one")
    phases = tuple(_phase(path, i, values) for i, values in enumerate(raw.pop("phases")))
    recipe = Recipe(Path(path).stem, phases, **raw)
    check_head(recipe.head)
    if recipe.order not in ORDERS:
        raise ConfigError(f"{path}: order {recipe.order!r} is unknown; choose {' or '.join(ORDERS)}")
    m = recipe.dropout_multiplier
    if m is not None and not (_fits(m, float) and 0 <= m < 2):
        raise ConfigError(f"{path}: dropout_multiplier {json.dumps(m)} must be a number of at least 0 and below 2")
    return recipe


def _phase(path: str, i: int, values: object) -> Phase:
    types = {field.name: field.type for field in fields(Phase)}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: phase {i} is no object in braces")
    values = {"name": f"phase {i}", **values}
    _refuse_unknown(f"{path}: phase {i}", values, types)
    for name, value in values.items():
        if not _fits(value, types[name]):
            raise ConfigError(f"{path}: phase {i}: {name} is {json.dumps(value)[:80]}, which it cannot be")
    if "groups" in values:
        values["groups"] = tuple(values["groups"])
    return Phase(**values)


def _fits(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return type(value) is int
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _refuse_unknown(where: str, values: dict, known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: {key!r} is unknown{nearest(key, known)}; choose among {', '.join(known)}")


def _or(value, default):
    return default if value is None else value


def group_of(name: str, n_layer: int, objective: str = "task") -> str:
    """The group that a parameter of :class:`megagpt.finetune.model.Classifier` belongs to.

    The last LayerNorm goes with the head, and without one with the upper blocks.
    """
    part, _, rest = name.removeprefix("gpt.").partition(".")
    if part in ("wte", "wpe"):
        return "embeddings"
    if part == "blocks":
        third, i = n_layer // 3, int(rest.partition(".")[0])
        return "lower" if i < third else "middle" if i < 2 * third else "upper"
    return "upper" if part == "ln_f" and objective == "lm" else "head"
