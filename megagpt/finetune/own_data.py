"""A user's own CSV, TSV and JSON lines as a task, described by the names of their columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import ConfigError, DataError, nearest
from megagpt.finetune import readers
from megagpt.finetune.drafts import (
    Draft,
    Part,
    check_training,
    choice_label,
    class_label,
    found_labels,
    number_label,
    part_of,
    set_label,
    split,
)
from megagpt.finetune.examples import KINDS, Split, TaskData
from megagpt.finetune.readers import BadRow, EmptyCell, Row, Rows
from megagpt.finetune.score import check_metrics, default_metrics

_N_TEXTS = {"classify": (1, 1), "multilabel": (1, 1), "entail": (2, 2), "similar": (2, 2), "choose": (1, 2)}


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are what. Raises ConfigError where that does not suit the kind."""

    kind: str
    text: tuple[str, ...] = ("text",)
    label: tuple[str, ...] = ("label",)  # several: multilabel with a column of 0 and 1 for each label
    choices: tuple[str, ...] = ()  # choose: a column for each, or one column of JSON lists
    id: str | None = None  # by default rows are numbered from 0
    label_separator: str = "|"  # between the labels in a cell of a multilabel table
    quoting: str = "auto"  # of tables: standard, none, or auto: standard in CSV, none in TSV

    def __post_init__(self) -> None:
        check_kind(self.kind)
        low, high = _N_TEXTS.get(self.kind, (1, 2))
        if not low <= len(self.text) <= high:
            needed = str(low) if low == high else f"{low} or {high}"
            raise ConfigError(
                f"--text_column {','.join(self.text)} names {len(self.text)} columns; kind {self.kind} has {needed}"
            )
        if (self.kind == "choose") != bool(self.choices):
            need = "needs --choice_column" if self.kind == "choose" else "has no choices: leave --choice_column out"
            raise ConfigError(f"kind {self.kind} {need}")
        if len(self.label) != 1 and self.kind != "multilabel":
            raise ConfigError(f"--label_column {','.join(self.label)}: kind {self.kind} has one column of labels")
        if self.quoting not in readers.QUOTING:
            raise ConfigError(f"--quoting {self.quoting!r} is unknown; choose {', '.join(readers.QUOTING)}")
        twice = [c for c in (*self.text, *self.choices) if c in self.label or (*self.text, *self.choices).count(c) > 1]
        if twice:
            raise ConfigError(f"column {twice[0]!r} is named twice; each column is one thing")


def check_kind(kind: str) -> None:
    """Raise ConfigError for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"kind {kind!r} is unknown{nearest(kind, KINDS)}; choose one of {', '.join(KINDS)}")


def load_files(
    train: str,
    valid: Mapping[str, str],
    test: Mapping[str, str] | None = None,
    columns: Columns | None = None,
    *,
    name: str = "own",
    metrics: Sequence[str] = (),
    n_choices: int | None = None,
    hierarchy: str = "",
    unlabelled: str | None = None,
) -> TaskData:
    """The task that a user's files describe.

    ``valid`` and ``test`` map a split's name to its file; test files may lack labels. ``n_choices``: the number of
    choices each example must have. ``hierarchy`` separates the levels of a multilabel label, as ``/`` in
    animal/bird: an example with a label has all above it. ``unlabelled``: a file of more texts.
    Raises ConfigError for settings and DataError for files that cannot be used.
    """
    columns = columns or Columns("classify")
    kind = columns.kind
    parts = {"train": _part(train, columns, labelled=True)}
    parts |= {key: _part(path, columns, labelled=True) for key, path in valid.items()}
    tests = {key: _part(path, columns, labelled=False) for key, path in (test or {}).items()}
    labels, parents = (), ()
    if kind == "multilabel":
        labels, parents = tree(columns.label if len(columns.label) > 1 else found_labels(parts["train"]), hierarchy)
    elif kind not in ("choose", "regress"):
        labels = found_labels(parts["train"])
    to_label = {
        "choose": lambda: choice_label(n_choices),
        "regress": number_label,
        "multilabel": lambda: with_ancestors(set_label(labels), parents),
    }.get(kind, lambda: class_label(labels))()
    train_split = split("train", parts.pop("train"), to_label)
    check_training(train_split, kind)
    chosen = tuple(metrics) or default_metrics(kind, len(labels))
    check_metrics(chosen, kind, len(labels))
    more = Columns("classify", columns.text[:1], ("",), id=columns.id, quoting=columns.quoting)
    return TaskData(
        task=name,
        kind=kind,
        labels=labels,
        metrics=chosen,
        train=train_split,
        valid={key: split(key, part, to_label) for key, part in parts.items()},
        test={key: split(key, part, to_label) for key, part in tests.items()},
        unlabelled=split("unlabelled", _part(unlabelled, more, labelled=False), _none) if unlabelled else None,
        parents=parents,
        text_columns=columns.text,
        choice_columns=columns.choices,
    )


def load_inputs(path: str, columns: Columns) -> Split:
    """The rows of ``path`` to be answered, labels left out. Raises DataError where a row cannot be used."""
    part = _part(path, columns, labelled=False)
    if part.bad:
        raise DataError(f"{len(part.bad):,} rows cannot be answered; the first: {part.bad[0]}")
    return split(Path(path).name, part, _none)


def _none(_: Draft) -> None:
    return None


def _part(path: str, columns: Columns, *, labelled: bool) -> Part:
    wanted = (*columns.text, *columns.choices, *([columns.id] if columns.id else []))
    rows = readers.read(path, wanted=wanted + (columns.label if labelled else ()), quoting=columns.quoting)
    has_label = set(columns.label) <= set(rows.columns)

    def make(row: Row, index: int) -> Draft:
        return Draft(
            id=readers.text(row, columns.id) if columns.id else str(index),
            texts=tuple(readers.text(row, column) for column in columns.text),
            label=_label(row, columns, labelled) if has_label else None,
            choices=_choices(row, rows, columns),
            place=row.place,
        )

    return part_of(rows, make, strict=True)


def _label(row: Row, columns: Columns, labelled: bool) -> str | tuple[str, ...] | None:
    if columns.kind == "multilabel":
        return _labels(row, columns)
    label = readers.text(row, columns.label[0]) if row.values.get(columns.label[0]) is not None else ""
    if not label and labelled:
        raise EmptyCell(f"no {columns.label[0]}")
    return label or None


def _labels(row: Row, columns: Columns) -> tuple[str, ...]:
    """An empty cell is an example without labels."""
    if len(columns.label) > 1:
        marks = {column: str(row.values.get(column)).strip() for column in columns.label}
        wrong = [f"{column} is {mark[:20]!r}, not 0 or 1" for column, mark in marks.items() if mark not in ("0", "1")]
        if wrong:
            raise BadRow(wrong[0])
        return tuple(column for column, mark in marks.items() if mark == "1")
    value = row.values.get(columns.label[0])
    if isinstance(value, list):
        return tuple(readers.check_text(str(name), "label") for name in value)
    names = readers.text(row, columns.label[0]).split(columns.label_separator)
    return tuple(name.strip() for name in names if name.strip())


def _choices(row: Row, rows: Rows, columns: Columns) -> tuple[str, ...]:
    if len(columns.choices) == 1:
        value = row.values.get(columns.choices[0])
        if not isinstance(value, list):
            raise DataError(
                f"{row.place}: {columns.choices[0]} is no list; name a column for each choice, or use JSON lines"
            )
        return tuple(readers.check_text(str(choice), "choice") for choice in value)
    return tuple(readers.text(row, column) for column in columns.choices)


def tree(names: Sequence[str], separator: str) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    """Labels with all that stand above them, parents first, and of each its parent's index; () without a separator."""
    if not separator:
        return tuple(names), ()
    paths = {
        separator.join(levels[: depth + 1])
        for levels in (name.split(separator) for name in names)
        for depth in range(len(levels))
    }
    ordered = sorted(paths, key=lambda path: path.split(separator))
    index = {path: i for i, path in enumerate(ordered)}
    return tuple(ordered), tuple(index.get(path.rpartition(separator)[0]) for path in ordered)


def with_ancestors(to_label, parents: Sequence[int | None]):
    """``to_label`` for a hierarchy: an example has every label above the ones it names."""
    if not parents:
        return to_label

    def label(d: Draft) -> tuple[int, ...] | None:
        pending = list(to_label(d) or ())
        found = set()
        while pending:
            if (i := pending.pop()) is not None and i not in found:
                found.add(i)
                pending.append(parents[i])
        return None if d.label is None else tuple(sorted(found))

    return label
