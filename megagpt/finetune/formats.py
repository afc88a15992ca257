"""Published formats that are no plain table of texts and labels: a function from a file or folder to drafts each."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from megagpt.errors import DataError
from megagpt.finetune import readers
from megagpt.finetune.drafts import Draft, Part, part_of
from megagpt.finetune.readers import BadRow, Row, Rows

# What the question of a COPA item asks for (SuperGLUE's wording).
_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
_DETERMINERS = {"the", "a", "an", "some", "this", "that", "these", "those", "his", "her", "its", "their", "my", "our"}


def race(path: Path) -> Part:
    """RACE: passages with questions of four options. A folder of one JSON object a file, or JSON lines."""
    return part_of(_objects(path), _race_questions)


def _race_questions(row: Row, _: int) -> list[Draft]:
    article, name = readers.text(row, "article"), readers.text(row, "id")
    questions, answers = _texts(row, "questions"), _texts(row, "answers")
    options = [_all_texts(choices, "options") for choices in _list(row, "options")]
    if not len(questions) == len(options) == len(answers):
        raise BadRow("questions, options and answers differ in number")
    items = zip(questions, options, answers, strict=True)
    return [
        Draft(f"{name}-{k}", (article, question.strip()), answer, tuple(o.strip() for o in choices), row.place)
        for k, (question, choices, answer) in enumerate(items)
    ]


def story_cloze(path: Path) -> Part:
    """Story Cloze: four sentences and two endings, the right one numbered from 1."""
    rows = readers.read(path, wanted=("InputSentence1", "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"))

    def story(row: Row, index: int) -> Draft:
        context = " ".join(readers.text(row, f"InputSentence{i}") for i in range(1, 5))
        endings = tuple(readers.text(row, f"RandomFifthSentenceQuiz{i}") for i in (1, 2))
        known = row.values.get("AnswerRightEnding")
        label = None if known is None else _from_zero(readers.text(row, "AnswerRightEnding"))
        name = readers.text(row, "InputStoryid") if "InputStoryid" in rows.columns else str(index)
        return Draft(name, (context,), label, endings, row.place)

    return part_of(rows, story)


def _from_zero(label: str) -> str:
    if label not in ("1", "2"):
        raise BadRow(f"AnswerRightEnding is {label[:20]!r}, not 1 or 2")
    return str(int(label) - 1)


def copa(path: Path) -> Part:
    """COPA as JSON lines: a premise, the question for its cause or effect, two answers."""

    def item(row: Row, index: int) -> Draft:
        asked = readers.text(row, "question")
        if asked not in _COPA_QUESTIONS:
            raise BadRow(f"question is {asked[:20]!r}, not cause or effect")
        choices = (readers.text(row, "choice1"), readers.text(row, "choice2"))
        label = readers.text(row, "label") if "label" in row.values else None
        texts = (readers.text(row, "premise"), _COPA_QUESTIONS[asked])
        return Draft(str(row.values.get("idx", index)), texts, label, choices, row.place)

    return part_of(readers.read(path, wanted=("premise", "question", "choice1", "choice2")), item)


def pronouns(path: Path) -> Part:
    """Pronoun resolution: the text up to the pronoun, to be continued with each candidate in its place.

    JSON lines of text, pronoun, candidates, label; or records of sentence, pronoun, candidates and answer, a line each,
    with a blank line between them (Rahman and Ng). Where the pronoun is not ``[MASK]``, the first one that follows all
    candidates is meant.
    """

    def item(row: Row, index: int) -> Draft:
        before, names, after, label = _substitutions(row)
        return Draft(str(index), (before.strip(),), label, tuple(name + after for name in names), row.place)

    return part_of(_pronoun_rows(path), item)


def substitutions(path: Path) -> Part:
    """As :func:`pronouns`, with what stands before and after the pronoun as texts and the candidates as choices."""

    def item(row: Row, index: int) -> Draft:
        before, names, after, label = _substitutions(row)
        return Draft(str(index), (before, after), label, names, row.place)

    return part_of(_pronoun_rows(path), item)


def _pronoun_rows(path: Path) -> Rows:
    return readers.read(path, wanted=("text", "pronoun", "candidates")) if path.suffix != ".txt" else _records(path)


def _substitutions(row: Row) -> tuple[str, tuple[str, ...], str, str | None]:
    """What stands before the pronoun, each candidate as it is written in its place, what follows, and the label."""
    sentence, pronoun = readers.text(row, "text"), readers.text(row, "pronoun")
    candidates = tuple(name.strip() for name in _texts(row, "candidates"))
    before, after = _around(sentence, pronoun, candidates)
    names = tuple(_in_place(name, pronoun, before) for name in candidates)
    return before, names, after, readers.text(row, "label") if "label" in row.values else None


def _around(sentence: str, pronoun: str, candidates: tuple[str, ...]) -> tuple[str, str]:
    """What stands before and after the pronoun that is meant."""
    if pronoun == "[MASK]":
        before, found, after = sentence.partition(pronoun)
        if not found or not before:
            raise BadRow("no [MASK] within the text")
        return before, after
    begin = max((_end_of(sentence, name) for name in candidates), default=0)
    match = re.compile(rf"\b{re.escape(pronoun)}\b").search(sentence, begin)
    if match is None:
        raise BadRow(f"no {pronoun[:20]!r} after the candidates")
    return sentence[: match.start()], sentence[match.end() :]


def _end_of(sentence: str, name: str) -> int:
    at = sentence.lower().find(name.lower())
    return at + len(name) if at >= 0 else 0


def _in_place(name: str, pronoun: str, before: str) -> str:
    """A candidate as it is written in the pronoun's place: its determiner is small within a sentence."""
    begins = pronoun[0].isupper() or before.rstrip().endswith((".", "!", "?"))
    if begins:
        return name[0].upper() + name[1:]
    first = name.split(" ", 1)[0]
    return name[0].lower() + name[1:] if first.lower() in _DETERMINERS else name


def _records(path: Path) -> Rows:
    found = Rows(str(path), ("text", "pronoun", "candidates", "label"))
    line = 1
    for block in re.split(r"\n[ \t]*\n", readers.content(str(path)).replace("\r\n", "\n")):
        fields = [field.strip() for field in block.strip("\n").split("\n")]
        place = f"{path}:{line}"
        line += block.count("\n") + 2
        if fields == [""]:
            continue
        names = [name.strip() for name in fields[2].split(",")] if len(fields) == 4 else []
        if len(fields) != 4 or fields[3] not in names:
            found.bad.append(f"{place}: not sentence, pronoun, candidates and one of them as the answer")
            continue
        values = {"text": fields[0], "pronoun": fields[1], "candidates": names, "label": names.index(fields[3])}
        found.rows.append(Row(place, values))
    return found


def imdb(path: Path) -> Part:
    """IMDB reviews: JSON lines with text and label 0 or 1, or the folder of the files pos/*.txt and neg/*.txt."""
    if not path.is_dir():
        return part_of(readers.read(path, wanted=("text",)), _review)
    rows = Rows(str(path), ("id", "text", "label"))
    for folder, label in (("neg", "0"), ("pos", "1"), ("unsup", None)):
        for file in sorted((path / folder).glob("*.txt")):
            review = readers.content(str(file)).replace("<br />", "\n")
            values = {"id": file.stem, "text": review, **({} if label is None else {"label": label})}
            rows.rows.append(Row(f"{file}:1", values))
    return part_of(rows, _review)


def unlabelled_reviews(path: Path) -> Part:
    """The reviews of a file, or of the files *.txt in a folder."""
    if not path.is_dir():
        return imdb(path)
    files = sorted(path.glob("*.txt"))
    rows = [Row(f"{file}:1", {"id": file.stem, "text": readers.content(str(file))}) for file in files]
    return part_of(Rows(str(path), ("id", "text"), rows), _review)


def _review(row: Row, index: int) -> Draft:
    label = readers.text(row, "label") if "label" in row.values else None
    return Draft(str(row.values.get("id", index)), (readers.text(row, "text"),), label, place=row.place)


def trec(level: str) -> Callable[[Path], Part]:
    """TREC questions with their ``coarse`` or ``fine`` label: a table, or lines COARSE:fine QUESTION in Latin-1."""

    def read(path: Path) -> Part:
        rows = readers.read(path, wanted=(level, "question")) if path.suffix == ".tsv" else _questions(path)

        def question(row: Row, index: int) -> Draft:
            return Draft(str(index), (readers.text(row, "question"),), readers.text(row, level), place=row.place)

        return part_of(rows, question)

    return read


def _questions(path: Path) -> Rows:
    found = Rows(str(path), ("coarse", "fine", "question"))
    for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), 1):
        fine, _, question = line.strip().partition(" ")
        values = {"coarse": fine.partition(":")[0], "fine": fine, "question": question}
        if ":" in fine:
            found.rows.append(Row(f"{path}:{number}", values))
        elif line.strip():
            found.bad.append(f"{path}:{number}: not COARSE:fine QUESTION")
    return found


def hallmarks(key: str) -> Callable[[Path], Part]:
    """Abstracts with their labels: the top-level ``labels``, or all paths of ``sentence_labels``."""

    def read(path: Path) -> Part:
        def abstract(row: Row, index: int) -> Draft:
            if key == "labels":
                labels = _texts(row, key)
            else:
                labels = sorted({label for found in _list(row, key) for label in _all_texts(found, key)})
            text = readers.check_text(" ".join(_texts(row, "sentences")), "sentences")
            return Draft(str(row.values.get("pmid", index)), (text,), tuple(labels), place=row.place)

        return part_of(readers.read(path, wanted=("sentences", key)), abstract)

    return read


def _list(row: Row, key: str) -> list:
    value = row.values.get(key)
    if not isinstance(value, list):
        raise BadRow(f"{key} is no list")
    return value


def _texts(row: Row, key: str) -> list[str]:
    return _all_texts(_list(row, key), key)


def _all_texts(values: object, key: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise BadRow(f"{key} is no list of texts")
    for value in values:
        readers.check_text(value, key)
    return values


def _objects(path: Path) -> Rows:
    """The JSON objects of a file of JSON lines, or of all files *.txt in a folder."""
    if not path.is_dir():
        return readers.read(path, wanted=("article", "questions", "options", "answers"))
    found = Rows(str(path), ())
    for file in sorted(path.glob("*.txt")):
        try:
            found.rows.append(Row(f"{file}:1", dict(json.loads(readers.content(str(file))))))
        except (ValueError, TypeError, RecursionError):
            found.bad.append(f"{file}:1: not a JSON object")
    if not found.rows and not found.bad:
        raise DataError(f"{path} has no files *.txt; give the folder as it was published")
    return found
