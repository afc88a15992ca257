"""From rows to a task: labels become indices, and what is wrong with the data is told in one sentence."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megagpt.errors import DataError, nearest
from megagpt.finetune.examples import Example, Split
from megagpt.finetune.readers import BadRow, EmptyCell, Row, Rows

_SHOWN = 5  # places kept of what is wrong


@dataclass(frozen=True)
class Draft:
    """An example whose label is still as it stands in the file."""

    id: str
    texts: tuple[str, ...]
    label: str | tuple[str, ...] | None = None  # None: not known
    choices: tuple[str, ...] = ()
    place: str = ""  # FILE:LINE


@dataclass
class Part:
    """The drafts of a split, from one file or several."""

    drafts: list[Draft] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)  # FILE:LINE: reason

    def __add__(self, other: "Part") -> "Part":
        return Part(self.drafts + other.drafts, self.bad + other.bad)


def part_of(rows: Rows, make: Callable[[Row, int], Draft | Sequence[Draft]], *, strict: bool = False) -> Part:
    """What ``make(row, index)`` makes of each row; rows in which it finds a fault are counted.

    With ``strict``, an empty text and a missing label are no fault to be counted but a DataError.
    """
    part = Part(bad=list(rows.bad))
    empty: list[tuple[str, str]] = []
    for index, row in enumerate(rows.rows):
        try:
            made = make(row, index)
        except EmptyCell as reason:
            empty.append((row.place, str(reason)))
            continue
        except BadRow as reason:
            part.bad.append(f"{row.place}: {reason}")
            continue
        for draft in [made] if isinstance(made, Draft) else made:
            if all(draft.texts) and all(draft.choices):
                part.drafts.append(draft)
            else:
                empty.append((row.place, "an empty text"))
    if strict and empty:
        places = [place for place, reason in empty if reason == empty[0][1]]
        raise DataError(f"{_rows(len(places))} {empty[0][1]}: {_listed(places)}; fill in or remove")
    part.bad += [f"{place}: {reason}" for place, reason in empty]
    return part


def split(name: str, part: Part, to_label: Callable[[Draft], object]) -> Split:
    """The examples of ``part`` with their labels. Raises DataError when it has none or a label does not fit."""
    if not part.drafts and not part.bad:
        raise DataError(f"there are no examples for {name}; give the folder of the task as it was published")
    if not part.drafts:
        raise DataError(f"no row for {name} can be used: {len(part.bad):,} are bad; the first: {part.bad[0]}")
    examples = tuple(Example(d.id, d.texts, d.choices, to_label(d)) for d in part.drafts)
    return Split(name, examples, len(part.bad), tuple(part.bad[:_SHOWN]))


def found_labels(part: Part) -> tuple[str, ...]:
    """The labels that occur, numbers in their order, other names by the alphabet."""
    names = {name for d in part.drafts for name in ((d.label,) if isinstance(d.label, str) else d.label or ())}
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def class_label(labels: Sequence[str], values: Sequence[str] = ()) -> Callable[[Draft], int | None]:
    """The index of a draft's label among ``values``, the labels as files write them (by default ``labels``)."""
    index = {value: i for i, value in enumerate(values or labels)}

    def label(d: Draft) -> int | None:
        return None if d.label is None else _index(index, d.label, d)

    return label


def set_label(labels: Sequence[str]) -> Callable[[Draft], tuple[int, ...] | None]:
    """The indices of all of a draft's labels, in ascending order."""
    index = {name: i for i, name in enumerate(labels)}

    def label(d: Draft) -> tuple[int, ...] | None:
        return None if d.label is None else tuple(sorted({_index(index, name, d) for name in d.label}))

    return label


def number_label(low: float = -math.inf, high: float = math.inf) -> Callable[[Draft], float | None]:
    """A draft's label as a number within [low, high]."""

    def label(d: Draft) -> float | None:
        if d.label is None:
            return None
        try:
            value = float(d.label)
        except ValueError:
            raise DataError(f"{d.place}: target {d.label[:40]!r} is not a number; correct or remove the row") from None
        if not math.isfinite(value) or not low <= value <= high:
            within = "" if math.isinf(low) else f" between {low:g} and {high:g}"
            raise DataError(f"{d.place}: target {d.label} is not a finite number{within}; correct or remove the row")
        return value

    return label


def choice_label(n_choices: int | None = None) -> Callable[[Draft], int | None]:
    """The index of the right choice, written as a number from 0 on or as a letter from A on.

    With ``n_choices``, every example must have so many.
    """

    def label(d: Draft) -> int | None:
        n = len(d.choices)
        if n < 2 or n_choices not in (None, n):
            needed = "at least 2 are needed" if n_choices is None else f"every example must have {n_choices}"
            raise DataError(f"{d.place}: {n} choice{'s' * (n != 1)} where {needed}; correct the row")
        if d.label is None:
            return None
        value = d.label.strip()
        letter = len(value) == 1 and value.isalpha() and value.isascii()
        index = ord(value.upper()) - ord("A") if letter else int(value) if value.isdecimal() else -1
        if not 0 <= index < n:
            raise DataError(
                f"{d.place}: label {value[:40]!r} names none of the {n} choices; number them from 0, or write A, B, ..."
            )
        return index

    return label


def _index(index: dict[str, int], name: str, d: Draft) -> int:
    if name not in index:
        known = ", ".join(list(index)[:12]) + (", ..." if len(index) > 12 else "")
        raise DataError(
            f"{d.place}: label {name[:40]!r}{nearest(name, index)} is none of the training labels {known}; "
            "correct it, or add such examples to the training file"
        )
    return index[name]


def check_training(data_split: Split, kind: str) -> None:
    """Raise DataError where nothing can be learnt: one class only, no label at all, or no labels."""
    labels = [e.label for e in data_split.examples]
    missing = sum(label is None for label in labels)
    if missing:
        raise DataError(f"{data_split.name}: {_rows(missing)} no label; training needs one for every example")
    if kind in ("classify", "entail", "similar") and len(set(labels)) < 2:
        raise DataError(f"{data_split.name}: all {len(labels):,} examples have the same label; training needs more")
    if kind == "multilabel" and not any(labels):
        raise DataError(f"{data_split.name}: no example has a label; training needs some")


def _rows(n: int) -> str:
    return f"{n:,} row{'s have' if n > 1 else ' has'}"


def _listed(places: list[str]) -> str:
    return ", ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
