"""The questions of tasks, read from their published files and put as the heuristics put them."""

import dataclasses
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.errors import ConfigError, DataError
from megagpt.finetune import formats
from megagpt.finetune.examples import Split
from megagpt.finetune.tasks import find_splits, find_task, load_splits
from megagpt.zeroshot.heuristics import HEURISTICS, Heuristic, Question, Scoring, find_heuristic

if TYPE_CHECKING:
    from megagpt.data.tokenizer import Tokenizer

Sequences = list[tuple[array, int]]  # of every option of every question, its ids and where the scored ones begin


@dataclass(frozen=True)
class Asked:
    """A task's questions; with ``training``, those that decide a threshold."""

    name: str
    heuristic: Heuristic
    scoring: Scoring
    questions: list[Question]
    training: list[Question]

    @property
    def all_questions(self) -> list[Question]:
        return [*self.training, *self.questions]


def load_tasks(
    names: Sequence[str],
    folder: str | Path,
    *,
    scoring: Scoring = "partial",
    limit: int | None = None,
    flag: str = "--task_data",
) -> list[Asked]:
    """The tasks ``names``, or all whose files are in ``folder`` where no name is given.

    ``limit`` leaves that many questions of a task, evenly spread over its files. Raises ConfigError for an unknown task
    and DataError where files are missing or hold no question with an answer.
    """
    if not Path(folder).is_dir():
        raise DataError(f"{flag} {folder} is no folder; give the one that holds the tasks' files")
    if names:
        for name in names:
            find_heuristic(name)
        return [_load(name, folder, scoring, limit) for name in dict.fromkeys(names)]
    found = []
    for name in HEURISTICS:
        try:
            found.append(_load(name, folder, scoring, limit))
        except _NoFiles:
            continue
    if not found:
        raise DataError(f"{folder} has the files of none of {', '.join(HEURISTICS)}; give the folder that holds them")
    return found


class _NoFiles(DataError):
    """The files of a task are not there."""


def _load(name: str, folder: str | Path, scoring: Scoring, limit: int | None) -> Asked:
    heuristic = HEURISTICS[name]
    task = find_task(heuristic.task)
    if heuristic.substitutes:
        task = dataclasses.replace(task, read=formats.substitutions)
    fits = heuristic.metric == "matthews"  # and needs a threshold
    wanted = (*heuristic.splits, *(["train"] if fits else []))
    there = find_splits(task, folder, wanted)
    missing = [split for split in wanted if split not in there]
    if not there or (fits and missing):
        raise _NoFiles(
            f"task {name} needs the files of its {' or '.join(missing)} split and {folder} has none, "
            f"neither in it nor in a folder {', '.join(dict.fromkeys((task.name, *task.folders)))}; "
            "give the folder of the task's files"
        )
    splits = load_splits(task, folder, wanted)
    training = splits.pop("train", None)
    questions = [question for split in splits.values() for question in _questions(name, heuristic, split, scoring)]
    trained = _questions(name, heuristic, training, scoring) if training else []
    return Asked(name, heuristic, scoring, _spread(questions, limit), _spread(trained, limit))


def _questions(name: str, heuristic: Heuristic, split: Split, scoring: Scoring) -> list[Question]:
    answered = [example for example in split.examples if example.label is not None]
    if not answered:
        raise DataError(f"no example of {name}'s {split.name} split has a label to compare with; take another file")
    return [Question(e.id, *heuristic.ask(e, scoring), int(e.label)) for e in answered]


def _spread(questions: list[Question], limit: int | None) -> list[Question]:
    n = len(questions) if limit is None else min(limit, len(questions))
    return [questions[i * len(questions) // n] for i in range(n)]


def encode(asked: Asked, tokenizer: "Tokenizer", context: int) -> Sequences:
    """What a model of ``context`` positions reads for every option of ``asked.all_questions``, in order.

    A text with nothing before it follows the end-of-text token; where the vocabulary has none its first token is not
    scored. Of what stands before an option as many tokens stay as the longest option of its question leaves room for.
    Raises DataError for an option longer than the context.
    """
    begin = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    sequences: Sequences = []
    for question in asked.all_questions:
        read = {text: tokenizer.encode(text) if text else begin for text in set(question.contexts)}
        options = [tokenizer.encode(text) for text in question.options]
        longest = max(map(len, options))
        if longest > context:
            raise DataError(
                f"an option of question {question.id} of {asked.name} has {longest:,} tokens and the model reads "
                f"{context:,}; take the question out, or another model"
            )
        for text, option in zip(question.contexts, options, strict=True):
            before = read[text][-(context + 1 - longest) :]
            sequences.append((array("i", [*before, *option]), max(1, len(before))))
    return sequences


def parse_names(words: Sequence[str]) -> tuple[str, ...]:
    """Names given one by one or with commas between them. Raises ConfigError for an unknown one."""
    names = tuple(name.strip() for word in words for name in word.split(",") if name.strip())
    if words and not names:
        raise ConfigError(f"--tasks names none; choose among {', '.join(HEURISTICS)}")
    for name in names:
        find_heuristic(name)
    return names
