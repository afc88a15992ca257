"""What a task is made of once its files are read: examples, splits, and the whole with its labels and metrics."""

import hashlib
import json
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from megagpt.errors import ConfigError

# What a model is asked; one function of transforms each.
#   classify    one text, one of K labels            entail   (premise, hypothesis), one of K labels
#   similar     (a, b) in either order, K labels      choose   the right one of any number of answers to a context
#   multilabel  one text, any number of K labels      regress  one or two texts, a number
KINDS = ("classify", "entail", "similar", "choose", "multilabel", "regress")


@dataclass(frozen=True)
class Example:
    """One question to the model.

    ``label``: index of the class or of the right choice; the indices of all labels for multilabel; a number for regress
    and for similar with ordered classes; None where it is not known.
    """

    id: str
    texts: tuple[str, ...]  # classify, multilabel: 1; entail, similar: 2; regress: 1 or 2; choose: context[, question]
    choices: tuple[str, ...] = ()  # choose alone
    label: int | float | tuple[int, ...] | None = None


@dataclass(frozen=True)
class Split:
    """The examples of one part of a task, in the order of its files."""

    name: str
    examples: tuple[Example, ...]
    n_skipped: int = 0  # rows that could not be read as examples
    skipped: tuple[str, ...] = ()  # the first of them, FILE:LINE: reason

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class TaskData:
    """A task with everything that was read for it."""

    task: str  # its name
    kind: str  # one of KINDS
    labels: tuple[str, ...]  # names of the classes; () for choose and regress
    metrics: tuple[str, ...]  # names in score.METRICS; the first one decides which checkpoint is best
    train: Split
    valid: dict[str, Split] = field(default_factory=dict)
    test: dict[str, Split] = field(default_factory=dict)
    unlabelled: Split | None = None  # more text of the task's domain, for fine-tuning the language model
    ordinal: bool = False  # labels are the whole numbers 0, 1, ... in order and targets lie anywhere between them
    parents: tuple[int | None, ...] = ()  # of each label its parent's index, for a hierarchy; () without one
    text_columns: tuple[str, ...] = ()  # what predict calls the texts of an example in a file
    choice_columns: tuple[str, ...] = ()  # ... and its choices

    @property
    def n_outputs(self) -> int:
        """Width of the head: K, or 1 for a number and for the score of a choice."""
        return len(self.labels) or 1

    def splits(self) -> Iterator[Split]:
        """Train, then every validation and test split."""
        yield self.train
        yield from self.valid.values()
        yield from self.test.values()

    def limited(self, limit: int | float, seed: int = 0, *, rest_as_text: bool = False) -> "TaskData":
        """The same task with fewer training examples: a number of at least 1, or a fraction below 1.

        Every class keeps its share, and at least one example where the limit allows it. A larger limit with the same
        seed contains the smaller one's examples of each class. ``rest_as_text``: the others are unlabelled text. Raises
        ConfigError for a limit that is not positive.
        """
        n = len(self.train)
        if not limit > 0 or (limit >= 1 and limit != int(limit)):
            raise ConfigError(f"limit_train {limit} must be a whole number of examples or a fraction below 1")
        wanted = min(n, int(limit) if limit >= 1 else max(1, round(limit * n)))
        chosen = _stratified([_stratum(e.label) for e in self.train.examples], wanted, seed)
        examples = tuple(self.train.examples[i] for i in chosen)
        limited = replace(self, train=replace(self.train, examples=examples))
        if not rest_as_text:
            return limited
        taken, others = set(chosen), self.unlabelled.examples if self.unlabelled else ()
        rest = tuple(replace(e, label=None) for i, e in enumerate(self.train.examples) if i not in taken)
        return replace(limited, unlabelled=Split("unlabelled", (*others, *rest)))

    def identity(self) -> dict:
        """Task, sizes and a hash of every split, which tell whether a checkpoint was made from the same data."""
        parts = [*self.splits(), *([self.unlabelled] if self.unlabelled else [])]
        return {
            "task": self.task,
            "kind": self.kind,
            "labels": list(self.labels),
            "splits": {part.name: {"examples": len(part), "sha256": _digest(part)} for part in parts},
        }


def _stratum(label):
    """Numbers count by their whole part; several labels by their set."""
    return math.floor(label) if isinstance(label, float) else label


def _stratified(strata: list, wanted: int, seed: int) -> list[int]:
    """Indices of ``wanted`` items in ascending order, each stratum with its share."""
    members = defaultdict(list)
    for i, stratum in enumerate(strata):
        members[stratum].append(i)
    rng = random.Random(seed)
    ranked = []  # an item's place within its stratum as a fraction: the first ones of all strata come first
    for group in members.values():
        rng.shuffle(group)
        ranked += [((place + 0.5 if place else 0.0) / len(group), i) for place, i in enumerate(group)]
    return sorted(i for _, i in sorted(ranked)[:wanted])


def _digest(split: Split) -> str:
    digest = hashlib.sha256()
    for e in split.examples:
        digest.update(json.dumps([e.id, e.texts, e.choices, e.label]).encode())
    return digest.hexdigest()
