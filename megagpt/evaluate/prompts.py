"""What a prompt is made of: prompts as they are, and those of GPT-2's paper for summaries, translation and questions.

"Language Models are Unsupervised Multitask Learners": section 3.6 (summaries), 3.7 (translation), 3.8 (questions).
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import ConfigError, DataError

Pair = tuple[str, str]
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n")


@dataclass(frozen=True)
class Preset:
    """How a task is put to the model, and what of its answer is kept."""

    prompt: Callable[[str, str, list[Pair]], str]  # (text, context, examples)
    max_tokens: int
    temperature: float
    top_k: int = 0
    stop: tuple[str, ...] = ()
    sentences: int | None = None  # kept of the answer


def _summary(text: str, context: str, examples: list[Pair]) -> str:
    return f"{text.rstrip()}\nTL;DR:"


def _translation(text: str, context: str, examples: list[Pair]) -> str:
    return "".join(f"{source} = {target}\n" for source, target in examples) + f"{text.strip()} ="


def _question(text: str, context: str, examples: list[Pair]) -> str:
    before = f"{context.rstrip()}\n" if context.strip() else ""
    shown = "".join(f"Q: {question}\nA: {answer}\n" for question, answer in examples)
    return f"{before}{shown}Q: {text.strip()}\nA:"


PRESETS = {
    "summary": Preset(_summary, max_tokens=100, temperature=1.0, top_k=2, sentences=3),
    "translation": Preset(_translation, max_tokens=100, temperature=0.0, stop=("\n",), sentences=1),
    "question": Preset(_question, max_tokens=50, temperature=0.0, stop=("\n",)),
}


def first_sentences(text: str, n: int) -> str:
    """The first ``n`` sentences of ``text``: each ends with a dot or its like before a space, or with its line."""
    text = text.lstrip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[n - 1]].rstrip() if len(ends) >= n else text.rstrip()


def read_pairs(path: str | None) -> list[Pair]:
    """Examples from a file: a line each, source or question, a tab, target or answer. Raises DataError."""
    pairs = []
    for number, line in _lines(path):
        left, tab, right = line.partition("\t")
        if not (tab and left.strip() and right.strip()) or "\t" in right:
            raise DataError(f"{path}, line {number}: {line[:60]!r} is no pair; write two texts with a tab between them")
        pairs.append((left.strip(), right.strip()))
    return pairs


def read_prompts(path: str) -> list[dict]:
    """The lines of a JSON-lines file: objects with a "prompt", a text. Raises DataError."""
    rows = []
    for number, line in _lines(path):
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError(f'{path}, line {number} is no object with a text under "prompt": {line[:60]!r}')
        rows.append(row)
    if not rows:
        raise DataError(f'{path} holds no prompts; write a line {{"prompt": "..."}} for each')
    return rows


def _refuse_constant(word: str):
    raise ValueError(f"{word} is no number of JSON's")


def read_text(path: str | None) -> str:
    """The content of a file, or nothing without one. Raises ConfigError."""
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start:,})") from None


def _lines(path: str | None) -> list[tuple[int, str]]:
    """The lines that are not blank, each with its number in the file."""
    return [(n, line) for n, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
