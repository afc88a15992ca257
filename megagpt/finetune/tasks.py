"""The tasks that are known by name: each a specification of a few lines, and one function that reads it.

A task's folder holds its published files under their own names. Where a public set has columns with names, those say
which column is what, so the files of the GLUE benchmark and those of its parts published elsewhere are read alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.errors import ConfigError, DataError, nearest
from megagpt.finetune import formats, readers
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
from megagpt.finetune.examples import Split, TaskData
from megagpt.finetune.own_data import tree, with_ancestors

Files = dict[str, tuple[str, ...]]  # of each split the names its file may have; with a slash at the end, a folder
_NLI = ("entailment", "neutral", "contradiction")
_STANDARD: Files = {"dev": ("dev.tsv", "dev.csv", "dev.jsonl")}
_TEST: Files = {"test": ("test.tsv", "test.csv", "test.jsonl")}


@dataclass(frozen=True)
class Task:
    """How a published set is read, judged and compared."""

    name: str
    kind: str
    metrics: tuple[str, ...]  # the first one decides which checkpoint is best
    source: str
    text: tuple[str, ...] = ("text",)  # columns
    label: str = "label"  # column
    labels: tuple[str, ...] = ()  # names of the classes; () to take those that occur in train
    values: tuple[str, ...] = ()  # the classes as the files write them, where that is not their name
    no_label: tuple[str, ...] = ()  # labels that stand for none: such rows are left out
    id: str = "index"  # column, where there is one
    joined: str | None = None  # put between the text columns to make them one text
    folders: tuple[str, ...] = ()  # names its folder may have, besides the task's
    train: tuple[str, ...] = ("train.tsv", "train.csv", "train.jsonl")
    valid: Files = field(default_factory=lambda: _STANDARD)
    test: Files = field(default_factory=lambda: _TEST)
    unlabelled: tuple[str, ...] = ()
    header: tuple[str, ...] | None = None  # columns of files without a header line; of test files only if headless_test
    headless_test: bool = True
    quoting: str = "auto"
    read: Callable[[Path], Part] | None = None  # instead of columns
    n_choices: int | None = None  # each example must have so many
    ordinal: bool = False  # labels are scores, and targets lie anywhere between them
    hierarchy: str = ""  # separates the levels of a label
    held_out: int = 0  # examples taken from train for validation where a set has no file for it


def _glue(
    name: str, folder: str, kind: str, text: tuple[str, ...], label: str, metrics: tuple[str, ...], **rest
) -> Task:
    labels = rest.pop("labels", ("0", "1"))
    return Task(name, kind, metrics, "gluebenchmark.com", text, label, labels, folders=(folder,), **rest)


_SENTENCES = ("sentence1", "sentence2")
_RTE = ("entailment", "not_entailment")
_ACCURACY = ("accuracy",)
_ACCURACY_F1 = ("accuracy", "macro_f1")
_F1_ACCURACY = ("f1", "accuracy")
_SNLI_TEST: Files = {"test": ("test.tsv", "snli_1.0_test.jsonl", "snli_1.0_test.txt")}

GLUE = (
    _glue("cola", "CoLA", "classify", ("sentence",), "label", ("matthews", "accuracy"),
          header=("source", "label", "mark", "sentence"), headless_test=False),
    _glue("sst2", "SST-2", "classify", ("sentence",), "label", _ACCURACY),
    _glue("mrpc", "MRPC", "similar", ("#1 String", "#2 String"), "Quality", _F1_ACCURACY),
    _glue("stsb", "STS-B", "similar", _SENTENCES, "score", ("pearson", "spearman"), ordinal=True,
          labels=tuple("012345")),
    _glue("qqp", "QQP", "similar", ("question1", "question2"), "is_duplicate", _F1_ACCURACY, id="id"),
    _glue("mnli", "MNLI", "entail", _SENTENCES, "gold_label", _ACCURACY, labels=_NLI, no_label=("-",),
          valid={"matched": ("dev_matched.tsv",), "mismatched": ("dev_mismatched.tsv",)},
          test={"test_matched": ("test_matched.tsv",), "test_mismatched": ("test_mismatched.tsv",),
                "diagnostic": ("../diagnostic/diagnostic.tsv", "../AX/diagnostic.tsv", "../AX/test.tsv")}),
    _glue("qnli", "QNLI", "entail", ("question", "sentence"), "label", _ACCURACY, labels=_RTE),
    _glue("rte", "RTE", "entail", _SENTENCES, "label", _ACCURACY, labels=_RTE),
    _glue("wnli", "WNLI", "entail", _SENTENCES, "label", _ACCURACY),
)  # fmt: skip

INFERENCE = (
    Task("mnli_sample", "entail", _ACCURACY, "1,000 pairs of MNLI", _SENTENCES, "gold_label", _NLI),
    Task("snli", "entail", _ACCURACY, "nlp.stanford.edu/projects/snli", _SENTENCES, "gold_label", _NLI,
         no_label=("-",), id="pairID", folders=("SNLI", "snli_1.0"),
         train=("train.tsv", "snli_1.0_train.jsonl", "snli_1.0_train.txt"),
         valid={"dev": ("dev.tsv", "snli_1.0_dev.jsonl", "snli_1.0_dev.txt")}, test=_SNLI_TEST),
    Task("scitail", "entail", _ACCURACY, "allenai.org/data/scitail", ("premise", "hypothesis"), "label",
         ("entails", "neutral"), folders=("SciTail", "SciTailV1.1/tsv_format", "tsv_format"),
         header=("premise", "hypothesis", "label"), train=("scitail_1.0_train.tsv", "train.tsv"),
         valid={"dev": ("scitail_1.0_dev.tsv", "dev.tsv")}, test={"test": ("scitail_1.0_test.tsv", "test.tsv")}),
    Task("sick", "entail", _ACCURACY, "SemEval-2014 task 1", ("sentence_A", "sentence_B"), "entailment_judgment",
         ("ENTAILMENT", "NEUTRAL", "CONTRADICTION"), id="pair_ID", folders=("SICK",),
         train=("train.tsv", "SICK_train.txt"), valid={"dev": ("dev.tsv", "SICK_trial.txt")},
         test={"test": ("test.tsv", "SICK_test_annotated.txt")}),
    Task("sick_relatedness", "similar", ("pearson", "spearman"), "SemEval-2014 task 1", ("sentence_A", "sentence_B"),
         "relatedness_score", tuple("012345"), id="pair_ID", folders=("sick", "SICK"), ordinal=True,
         train=("train.tsv", "SICK_train.txt"), valid={"dev": ("dev.tsv", "SICK_trial.txt")},
         test={"test": ("test.tsv", "SICK_test_annotated.txt")}),
)  # fmt: skip

CHOICES = (
    Task("race", "choose", _ACCURACY, "RACE (Lai et al. 2017)", read=formats.race, n_choices=4, folders=("RACE",),
         train=("train.middle.jsonl+train.high.jsonl", "train/middle/+train/high/"),
         valid={"high": ("dev.high.jsonl", "dev/high/"), "middle": ("dev.middle.jsonl", "dev/middle/")},
         test={"test_high": ("test.high.jsonl", "test/high/"), "test_middle": ("test.middle.jsonl", "test/middle/")}),
    *(Task(f"race_{level}", "choose", _ACCURACY, "RACE (Lai et al. 2017)", read=formats.race, n_choices=4,
           folders=("race", "RACE"), train=(f"train.{level}.jsonl", f"train/{level}/"),
           valid={level: (f"dev.{level}.jsonl", f"dev/{level}/")},
           test={f"test_{level}": (f"test.{level}.jsonl", f"test/{level}/")}) for level in ("middle", "high")),
    Task("story_cloze", "choose", _ACCURACY, "cs.rochester.edu/nlp/rocstories", read=formats.story_cloze, n_choices=2,
         folders=("StoryCloze", "rocstories"), held_out=374,  # 374 of 1,871 as in the authors' code
         train=("cloze_test_val__spring2016 - cloze_test_ALL_val.csv", "cloze_test_val__spring2016.csv", "train.csv"),
         valid={}, test={"test": ("cloze_test_test__spring2016 - cloze_test_ALL_test.csv",
                                  "cloze_test_test__spring2016.csv", "test.csv")}),
    Task("copa", "choose", _ACCURACY, "COPA (Roemmele et al. 2011)", read=formats.copa, n_choices=2,
         folders=("COPA",), valid={"dev": ("dev.jsonl", "val.jsonl")}),
    Task("copa_balanced", "choose", _ACCURACY, "Balanced COPA (Kavumba et al. 2019)", read=formats.copa, n_choices=2,
         folders=("copa",), train=("train.jsonl+train_mirrored.jsonl",)),
    Task("dpr", "choose", _ACCURACY, "definite pronouns (Rahman and Ng 2012)", read=formats.pronouns,
         folders=("winograd", "DPR"), train=("dpr_train.jsonl", "train.c.txt"),
         valid={"dev": ("dpr_dev.jsonl",), "pdp60": ("pdp60.jsonl",)}, test={"test": ("test.c.txt",)}, held_out=131),
)  # fmt: skip

TEXTS = (
    Task("airline", "classify", _ACCURACY_F1, "Twitter US Airline Sentiment", ("text",), "airline_sentiment",
         ("negative", "neutral", "positive"), id="tweet_id", train=("Tweets_train.csv",),
         valid={"dev": ("Tweets_dev.csv",)}, test={"test": ("Tweets_test.csv",)}),
    Task("sst2_sentences", "classify", _ACCURACY, "whole sentences of SST-2", ("sentence",), "label", ("0", "1"),
         folders=("sst2", "SST-2"), train=("train_sentences.tsv",)),
    Task("imdb", "classify", _ACCURACY, "ai.stanford.edu/~amaas/data/sentiment", labels=("negative", "positive"),
         values=("0", "1"), read=formats.imdb, folders=("aclImdb",), train=("train.jsonl", "train/"), held_out=2500,
         valid={"dev": ("dev.jsonl",)}, test={"test": ("test.jsonl", "test/")},
         unlabelled=("unsup.jsonl", "train/unsup/")),
    Task("trec", "classify", _ACCURACY, "TREC question types", labels=("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
         read=formats.trec("coarse"), folders=("TREC",), train=("train.tsv", "train_5500.label"), held_out=500,
         test={"test": ("test.tsv", "TREC_10.label")}),
    Task("trec_fine", "classify", _ACCURACY, "TREC question types", read=formats.trec("fine"),
         folders=("trec", "TREC"), train=("train.tsv", "train_5500.label"), held_out=500,
         test={"test": ("test.tsv", "TREC_10.label")}),
    Task("ag_news", "classify", _ACCURACY, "AG News (Zhang et al. 2015)", ("title", "description"), "class",
         ("World", "Sports", "Business", "Sci/Tech"), values=tuple("1234"), joined="\n", folders=("ag_news_csv",),
         header=("class", "title", "description"), train=("train.csv",), held_out=1900),
    Task("hallmarks", "multilabel", ("micro_f1", "macro_f1"), "Hallmarks of Cancer (Baker et al. 2016)",
         read=formats.hallmarks("labels"), folders=("hallmarks_of_cancer", "multilabel/hallmarks_of_cancer")),
    Task("hallmarks_tree", "multilabel", ("micro_f1", "macro_f1"), "Hallmarks of Cancer (Baker et al. 2016)",
         read=formats.hallmarks("sentence_labels"), hierarchy="--",
         folders=("hallmarks_of_cancer", "multilabel/hallmarks_of_cancer")),
)  # fmt: skip

LANGUAGES = (
    *(Task(f"afrisenti_{code}", "classify", _ACCURACY_F1, "AfriSenti (SemEval-2023 task 12)", ("tweet",), "label",
           ("negative", "neutral", "positive"), id="ID", folders=("afrisenti", "multilingual/afrisenti"),
           train=(f"{code}_train.tsv",), valid={"dev": (f"{code}_dev.tsv",)}, test={"test": (f"{code}_test.tsv",)})
      for code in ("am", "dz", "ha", "ig", "kr", "ma", "pcm", "pt", "sw", "ts", "twi", "yo")),
    *(Task(f"masakhanews_{code}", "classify", _ACCURACY_F1, "MasakhaNEWS", ("headline", "text"), "category",
           joined="\n", quoting="standard", folders=(f"masakhanews/{code}", f"multilingual/masakhanews/{code}"))
      for code in ("lin", "lug", "pcm", "sna", "xho")),
)  # fmt: skip

TASKS = {task.name: task for task in (*GLUE, *INFERENCE, *CHOICES, *TEXTS, *LANGUAGES)}


def find_task(name: str) -> Task:
    """The task called ``name``. Raises ConfigError, with the nearest name, where there is none."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown{nearest(name, TASKS)}; megagpt tasks lists them")
    return TASKS[name]


def find_folder(task: Task, folder: str | Path) -> Path | None:
    """The folder with the task's training file: ``folder`` itself, or one in it by a name of the task's."""
    root = Path(folder)
    for base in (root, root / "tasks"):
        for name in ("", task.name, *task.folders):
            if files_of(base / name, task.train):
                return base / name
    return None


def home_of(task: Task, folder: str | Path) -> Path:
    """The same folder. Raises DataError where there is none."""
    home = find_folder(task, folder)
    if home is None:
        raise DataError(
            f"{folder} has no {task.train[0].replace('+', ' and ')} of task {task.name}, neither in it nor in a folder "
            f"{', '.join(dict.fromkeys((task.name, *task.folders)))}; give the folder of the task's files"
        )
    return home


def files_of(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The files, or folders, of a split: the first of ``names`` that is there; parts of one name are joined by +."""
    for name in names:
        parts = name.split("+")
        found = [_folder(folder / part) if part.endswith("/") else readers.find(folder, part) for part in parts]
        if all(found):
            return found
    return []


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else None


def load_task(name: str, folder: str | Path) -> TaskData:
    """The task ``name`` from its published files in ``folder`` or below it.

    Raises ConfigError for an unknown task and DataError where files are missing or cannot be used.
    """
    task = find_task(name)
    home = home_of(task, folder)
    train = _read(task, files_of(home, task.train))
    valid = {key: _read(task, found) for key, names in task.valid.items() if (found := files_of(home, names))}
    tests = {key: _read(task, found, test=True) for key, names in task.test.items() if (found := files_of(home, names))}
    if not valid:
        if not task.held_out:
            raise DataError(f"{home} has no {' or '.join(n[0] for n in task.valid.values())}, to validate {name} on")
        train, valid["dev"] = _hold_out(train, task.held_out)
    labels, parents, to_label = _labels(task, train)
    train_split = split("train", train, to_label)
    check_training(train_split, task.kind)
    found = files_of(home, task.unlabelled)
    return TaskData(
        task=name,
        kind=task.kind,
        labels=labels,
        metrics=task.metrics,
        train=train_split,
        valid={key: split(key, part, to_label) for key, part in valid.items()},
        test={key: split(key, part, to_label) for key, part in tests.items()},
        unlabelled=split("unlabelled", formats.unlabelled_reviews(found[0]), lambda _: None) if found else None,
        ordinal=task.ordinal,
        parents=parents,
        text_columns=task.text[:1] if task.joined else task.text,
        choice_columns=("choice1", "choice2") if task.kind == "choose" else (),
    )


def find_splits(task: Task, folder: str | Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The files, or folders, of those of the splits ``names`` that are there; empty where none is."""
    files = {"train": task.train, **task.valid, **task.test}
    for base in (Path(folder), Path(folder) / "tasks"):
        for sub in ("", task.name, *task.folders):
            found = {name: paths for name in names if (paths := files_of(base / sub, files[name]))}
            if found:
                return found
    return {}


def load_splits(task: Task, folder: str | Path, names: Sequence[str]) -> dict[str, Split]:
    """Those of the splits ``names`` that are there, and no other file: a whole task may take minutes to read.

    ``task`` has its classes' names or is of kind choose. Raises DataError where a file cannot be used.
    """
    _, _, to_label = _labels(task, Part())
    found = find_splits(task, folder, names)
    return {name: split(name, _read(task, paths), to_label) for name, paths in found.items()}


def _labels(task: Task, train: Part):
    """Names of the classes, their parents, and the function from a draft to its label."""
    if task.kind == "choose":
        return (), (), choice_label(task.n_choices)
    if task.ordinal:
        return task.labels, (), number_label(float(task.labels[0]), float(task.labels[-1]))
    labels, parents = tree(task.labels or found_labels(train), task.hierarchy)
    if task.kind == "multilabel":
        return labels, parents, with_ancestors(set_label(labels), parents)
    return labels, (), class_label(labels, task.values)


def _hold_out(part: Part, n: int) -> tuple[Part, Part]:
    """The last ``n`` drafts, at most half, of an order drawn once and for all, for validation."""
    import random

    order = list(range(len(part.drafts)))
    random.Random(0).shuffle(order)
    cut = len(order) - min(n, len(order) // 2)
    kept, held = (sorted(order[:cut]), sorted(order[cut:]))
    return Part([part.drafts[i] for i in kept], part.bad), Part([part.drafts[i] for i in held])


def _read(task: Task, paths: list[Path], *, test: bool = False) -> Part:
    part = Part()
    for path in paths:
        part += task.read(path) if task.read else _columns(task, path, test)
    return part


def _columns(task: Task, path: Path, test: bool) -> Part:
    header = task.header if task.headless_test or not test else None
    wanted = task.text if test else (*task.text, task.label)
    rows = readers.read(path, header=header, wanted=wanted, quoting=task.quoting)
    has_id, has_label = task.id in rows.columns, task.label in rows.columns

    def make(row: readers.Row, index: int) -> Draft:
        label = readers.text(row, task.label) if has_label else None
        if label in task.no_label:
            raise readers.BadRow(f"label {label!r} stands for none")
        if has_label and not label:
            raise readers.EmptyCell(f"no {task.label}")
        texts = tuple(readers.text(row, column) for column in task.text)
        if task.joined is not None:
            texts = (task.joined.join(filter(None, texts)),)
        return Draft(readers.text(row, task.id) if has_id else str(index), texts, label, place=row.place)

    return part_of(rows, make)
