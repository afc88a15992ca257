"""Training a byte-pair vocabulary: byte-level as in GPT-2, or of characters with word ends as in GPT-1."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megagpt.data.encode import pieces
from megagpt.data.tokenizer import Tokenizer
from megagpt.data.vocabularies import END_OF_TEXT, UNKNOWN, set_text_rules
from megagpt.errors import ConfigError, nearest

_STYLES = ("bytelevel", "wordend")
_SMALLEST = 257  # all bytes and the end of text
_LARGEST = 1_000_000


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

    The end-of-text token is among them. Small texts give a smaller vocabulary.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    word_end = training.style == "wordend"
    if word_end:
        model, special, alphabet = models.BPE(unk_token=UNKNOWN, end_of_word_suffix="</w>"), [UNKNOWN, END_OF_TEXT], []
    else:
        model, special, alphabet = models.BPE(), [END_OF_TEXT], pre_tokenizers.ByteLevel.alphabet()
    tokenizer = tokenizers.Tokenizer(model)
    set_text_rules(tokenizer, word_end=word_end)
    trainer = trainers.BpeTrainer(
        vocab_size=training.vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
        min_frequency=2,
        **({"end_of_word_suffix": "</w>", "limit_alphabet": 1000} if word_end else {}),
    )
    counted = _Counted(texts)
    tokenizer.train_from_iterator(counted, trainer)
    if not counted.characters:
        return None
    return Tokenizer(tokenizer.to_str().encode(), f"train:{training.vocab_size}")


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
