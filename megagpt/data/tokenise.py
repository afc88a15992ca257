"""What a worker does with a block: texts, cleaned if asked, encoded, divided into training and validation documents."""

import hashlib
from dataclasses import dataclass

import numpy as np

from megagpt.data.clean import clean_gpt1, shuffle_sentences
from megagpt.data.documents import EMPTY, Skipped, head, texts
from megagpt.data.encode import Encoder
from megagpt.data.indexed import dtype_for
from megagpt.data.readers import Block
from megagpt.data.tokenizer import Tokenizer
from megagpt.data.writer import Counts

_KEYED = 4096  # characters of a document that decide on which side of the split it is
_HELD = 1 << 19  # ids in a list, where each takes 40 bytes, before they go into an array
_SPACES = np.zeros(256, bool)
_SPACES[list(b" \t\n\r\v\f")] = True


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which ids a block becomes."""

    tokenizer_json: bytes
    tokenizer_name: str = "the corpus's tokenizer"  # for messages
    json_key: str = "text"
    clean: str = "none"
    shuffle_sentences: bool = False
    valid_fraction: float = 0.0


@dataclass(frozen=True)
class Part:
    """Ids in the corpus's type, the lengths of the documents that end in them, and how many ids follow the last end."""

    ids: np.ndarray
    lengths: np.ndarray
    open_length: int
    counts: Counts


@dataclass(frozen=True)
class Result:
    """What a block became: one part for training and one for validation, and what was left out."""

    parts: tuple[Part, Part]
    skipped: Skipped


class Worker:
    """Turns blocks into results; a process makes one and keeps it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._tokenizer = Tokenizer(recipe.tokenizer_json, recipe.tokenizer_name)
        self._encode = Encoder(self._tokenizer)
        self._dtype = dtype_for(self._tokenizer.vocab_size)

    def __call__(self, block: Block) -> Result:
        skipped = Skipped()
        sides: tuple[list[str], list[str]] = ([], [])
        for text in texts(block, self._recipe.json_key, skipped):
            sides[self._is_valid(text, block)].append(text)
        train, valid = (self._part(side, block, skipped) for side in sides)
        return Result((train, valid), skipped)

    def _is_valid(self, text: str, block: Block) -> bool:
        """Whether a document is for validation, by a hash of its beginning: equal documents are on one side."""
        if not self._recipe.valid_fraction:
            return False
        key = text[:_KEYED] if block.begins else head(block, _KEYED)
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        return number < self._recipe.valid_fraction * 2**64

    def _part(self, originals: list[str], block: Block, skipped: Skipped) -> Part:
        arrays: list[np.ndarray] = []
        held: list[int] = []
        lengths: list[int] = []
        counts = Counts()
        for text in originals:
            length = 0
            for ids in self._encode(self._prepared(text, block.begins), block.begins):
                length += len(ids)
                held += ids
                if len(held) > _HELD:
                    arrays.append(np.array(held, self._dtype))
                    held = []
            if not length and block.begins and block.ends:
                skipped.note(EMPTY)
                continue
            if block.ends and self._tokenizer.eot_id is not None:
                held.append(self._tokenizer.eot_id)
                length += 1
            lengths.append(length)
            utf8 = text.encode()
            counts.n_words += _n_words(utf8)
            counts.n_bytes += len(utf8)
        ids = np.concatenate([*arrays, np.array(held, self._dtype)])
        counts.n_tokens, counts.max_id = len(ids), int(ids.max(initial=0))
        if not block.ends:
            return Part(ids, np.empty(0, np.int64), len(ids), counts)
        counts.n_documents = len(lengths)
        return Part(ids, np.array(lengths, np.int64), 0, counts)

    def _prepared(self, text: str, begins: bool) -> str:
        if self._recipe.shuffle_sentences:
            text = shuffle_sentences(text)
        if self._recipe.clean == "gpt1":
            cleaned = clean_gpt1(text)
            # the space between two pieces of a long document is part of the second
            return cleaned if begins or not text[:1].isspace() else f" {cleaned}"
        return text


def _n_words(data: bytes) -> int:
    """Runs of bytes that are not ASCII white space."""
    spaces = _SPACES[np.frombuffer(data, np.uint8)]
    return int(np.count_nonzero(spaces[:-1] & ~spaces[1:])) + int(len(spaces) > 0 and not spaces[0])
