"""Training a byte-pair vocabulary: byte-level as in GPT-2, or of characters with word ends as in GPT-1."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megagpt.data.encode import pieces
from megagpt.data.tokenizer import Tokenizer
from megagpt.data.vocabularies import END_OF_TEXT, UNKNOWN, definition, set_text_rules
from megagpt.errors import ConfigError, nearest

_STYLES = ("bytelevel", "wordend")
_SMALLEST = 257  # all bytes and the end of text
_LARGEST = 1_000_000
_CHARACTERS = 1000  # at most this many in a word-end vocabulary; GPT-1's has 238
_END = "</w>"


class Training(NamedTuple):
    """What ``train:N[:style]`` asks for."""

    vocab_size: int
    style: str


def parse_training(spec: str) -> Training | None:
    """What a tokenizer spec asks to train; None for one that names an existing tokenizer. Raises ConfigError."""
    if not spec.startswith("train:"):
        return None
    size, _, style = spec.removeprefix("train:").partition(":")
    style = style or _STYLES[0]
    if style not in _STYLES:
        raise ConfigError(f"--tokenizer {spec}: {style!r} is not one of {', '.join(_STYLES)}{nearest(style, _STYLES)}")
    if not re.fullmatch(r"[0-9]{1,9}", size) or not _SMALLEST <= int(size) <= _LARGEST:
        raise ConfigError(
            f"--tokenizer {spec}: train:N takes a vocabulary of {_SMALLEST} to {_LARGEST:,} tokens, as in train:8192"
        )
    return Training(int(size), style)


def train(texts: Iterable[str], training: Training) -> Tokenizer | None:
    """A vocabulary of at most ``training.vocab_size`` tokens from ``texts``; None where there is no text.

    The end-of-text token is among them. Small texts give a smaller vocabulary. ``texts`` may be gone over twice; equal
    texts give equal tokenizers in any process, so that the shards of a corpus share theirs.
    """
    return _word_end(texts, training) if training.style == "wordend" else _byte_level(texts, training)


def _byte_level(texts: Iterable[str], training: Training) -> Tokenizer | None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    set_text_rules(tokenizer, word_end=False)
    counted = _Counted(texts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(counted, _trainer(training, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet))
    if not counted.characters:
        return None
    return Tokenizer(tokenizer.to_str().encode(), f"train:{training.vocab_size}")


def _word_end(texts: Iterable[str], training: Training) -> Tokenizer | None:
    """As GPT-1's vocabulary: every character as such and as a word's last one, then the merges.

    The library numbers characters at word ends in the order of a hash table that differs in every process, and breaks
    ties between pairs by these numbers. Given as special tokens they have fixed ones, and are made plain afterwards.
    """
    import tokenizers
    from tokenizers import models

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=UNKNOWN, end_of_word_suffix=_END))
    set_text_rules(tokenizer, word_end=True)
    alphabet = _alphabet(texts, tokenizer.normalizer, min(_CHARACTERS, training.vocab_size // 4))
    if not alphabet:
        return None
    trainer = _trainer(
        training,
        special_tokens=[UNKNOWN, END_OF_TEXT, *alphabet, *(character + _END for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        end_of_word_suffix=_END,
    )
    tokenizer.train_from_iterator(_Counted(texts), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    content = definition(model["vocab"], [tuple(pair) for pair in model["merges"]], word_end=True)
    return Tokenizer(content, f"train:{training.vocab_size}:wordend")


def _trainer(training: Training, **options):
    from tokenizers import trainers

    return trainers.BpeTrainer(vocab_size=training.vocab_size, min_frequency=2, show_progress=False, **options)


def _alphabet(texts: Iterable[str], normalizer, n: int) -> list[str]:
    """The ``n`` most frequent characters of words, in the order of their code points."""
    counts: Counter[str] = Counter()
    for text in _Counted(texts):
        counts.update(normalizer.normalize_str(text))
    by_frequency = sorted((-count, c) for c, count in counts.items() if c == "\n" or not c.isspace())
    return sorted(c for _, c in by_frequency[:n])


class _Counted:
    """Texts in pieces of bounded length, and how many characters went by."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            for piece in pieces(text):
                self.characters += len(piece)
                yield piece
