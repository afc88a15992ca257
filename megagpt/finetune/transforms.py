"""From an example to the token sequences that the model reads (Radford et al. 2018, section 3.3 and figure 1).

    classify, multilabel    <s> text <e>
    entail                  <s> premise $ hypothesis <e>
    similar                 <s> a $ b <e> and <s> b $ a <e>
    choose                  <s> context question $ choice <e>, one for each choice
    regress                 as classify with one text, as similar with two

The three task tokens are new rows of the embedding after the vocabulary. Every sequence ends with the extract token
<e>, at which the head reads.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megagpt.data.clean import clean_gpt1
from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError, DataError
from megagpt.finetune.examples import Example

N_TASK_TOKENS = 3
_SHORTEST = 8  # positions in which two segments of one token and the task tokens have room


class TaskTokens(NamedTuple):
    """Ids of the rows after a vocabulary."""

    start: int
    delimiter: int
    extract: int

    @classmethod
    def after(cls, vocab_size: int) -> "TaskTokens":
        """The three rows after a table of ``vocab_size`` rows."""
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


@dataclass(frozen=True)
class Unit:
    """What the head reads once: one sequence, or the windows of a long document in their order.

    ``extract`` is the position of the extract token in the last one.
    """

    sequences: tuple[np.ndarray, ...]  # int32 each
    extract: int


class Texts:
    """Texts to ids, each text once."""

    def __init__(self, tokenizer: Tokenizer, clean: str = "none") -> None:
        self._tokenizer = tokenizer
        self._clean = clean_gpt1 if clean == "gpt1" else str
        self._known: dict[str, np.ndarray] = {}

    def ids(self, text: str, where: str) -> np.ndarray:
        """int32 (n,), n at least 1. Raises DataError for a text of which nothing is left."""
        if text not in self._known:
            self._known[text] = np.array(self._tokenizer.encode(self._clean(text)), dtype=np.int32)
        ids = self._known[text]
        if not len(ids):
            raise DataError(f"example {where}: {text[:40]!r} has no tokens; leave such rows out of the file")
        return ids


@dataclass(frozen=True)
class Transform:
    """How examples of one task become units."""

    kind: str
    texts: Texts
    tokens: TaskTokens
    context: int  # longest sequence
    document: int | None = None  # tokens of a long document that are kept, its last; None: one sequence a text

    def __post_init__(self) -> None:
        if self.context < _SHORTEST:
            raise ConfigError(
                f"the model reads {self.context} tokens and a task needs at least {_SHORTEST}; start from another model"
            )
        if self.document and self.kind in ("entail", "similar", "choose"):
            raise ConfigError(f"--document_tokens is for one text an example; kind {self.kind} has more")

    def units(self, example: Example) -> list[Unit]:
        """The units of ``example``: one; two for similar; one for each choice."""
        texts = [self.texts.ids(text, example.id) for text in example.texts]
        if self.kind == "choose":
            return [self._unit(*self._choice(texts, self.texts.ids(c, example.id))) for c in example.choices]
        if len(texts) == 1:
            return [self._document(texts[0]) if self.document else self._unit(texts[0][: self.context - 2])]
        a, b = (ids[: self.context // 2 - 2] for ids in texts)
        if self.kind == "entail":
            return [self._unit(a, b)]
        # In an order of their own, so that (a, b) and (b, a) are the same computation and score alike to the last bit.
        a, b = sorted((a, b), key=lambda ids: ids.tolist())
        return [self._unit(a, b), self._unit(b, a)]

    def cuts(self, example: Example) -> bool:
        """Whether something of ``example`` is left out because it is too long."""
        lengths = [len(self.texts.ids(text, example.id)) for text in (*example.texts, *example.choices)]
        if self.kind == "choose":
            quarter, n = self.context // 4, len(example.texts)
            context, questions, choices = lengths[0], lengths[1:n], lengths[n:]
            return max(questions + choices) > quarter or context + sum(questions) + max(choices) > self.context - 3
        if len(lengths) == 1:
            return lengths[0] > (self.document or self.context - 2)
        return max(lengths) > self.context // 2 - 2

    def _unit(self, *segments: np.ndarray) -> Unit:
        parts: list = [[self.tokens.start], segments[0]]
        for segment in segments[1:]:
            parts += [[self.tokens.delimiter], segment]
        ids = np.concatenate([*parts, [self.tokens.extract]]).astype(np.int32)
        return Unit((ids,), len(ids) - 1)

    def _choice(self, texts: list[np.ndarray], choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The context, cut at its end so that question and choice have room, with the question; and the choice."""
        quarter = self.context // 4
        context, *questions = texts
        questions = [question[:quarter] for question in questions]
        choice = choice[:quarter]
        room = self.context - 3 - len(choice) - sum(map(len, questions))
        return np.concatenate([context[:room], *questions]), choice

    def _document(self, ids: np.ndarray) -> Unit:
        """Windows of ``context`` tokens, counted from the end, where the document's kept part ends."""
        kept = ids[-self.document :]
        (whole,) = self._unit(kept).sequences
        first = len(whole) % self.context or self.context
        windows = np.split(whole, range(first, len(whole), self.context))
        return Unit(tuple(windows), len(windows[-1]) - 1)


def stream(texts: Texts, examples: Iterable[Example], tokens: TaskTokens) -> list[np.ndarray]:
    """Every text of ``examples`` once as <s> text <e>, for the language model."""
    pieces = dict.fromkeys(text for e in examples for text in (*e.texts, *e.choices))
    return [
        np.concatenate([[tokens.start], texts.ids(text, text[:20]), [tokens.extract]]).astype(np.int32)
        for text in pieces
    ]
