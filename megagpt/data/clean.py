"""What may be done to a document's text before it is tokenised: GPT-1's cleaning, and shuffling its sentences."""

import re
import unicodedata
from random import Random

_REPLACED = str.maketrans({"—": "-", "–": "-", "―": "-", "…": "...", "´": "'"})  # noqa: RUF001 these are meant
_RUN = re.compile(r"""(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|/+|\*+|\[+|\]+|\}+|\{+|\|+|_+)""")
_LINE_END = re.compile(r"\s*\n\s*")
_SPACES = re.compile(r"[^\S\n]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])(\s+)")


def clean_gpt1(text: str) -> str:
    """``text`` as GPT-1's authors cleaned theirs (openai/finetune-transformer-lm text_utils.py).

    Unicode repaired; dashes, ellipses and accents used as apostrophes made ASCII; runs of one punctuation character set
    apart by spaces; a single space on either side of every line end and single spaces elsewhere.
    """
    text = _repaired(text).translate(_REPLACED)
    text = _RUN.sub(r" \1 ", text)
    text = _LINE_END.sub(" \n ", text)
    return _SPACES.sub(" ", text).strip()


def _repaired(text: str) -> str:
    """Undo wrong decodings with ftfy where it is installed (extra ``data``), else only compose characters (NFC)."""
    try:
        import ftfy
    except ImportError:
        return unicodedata.normalize("NFC", text)
    return ftfy.fix_text(text)


def shuffle_sentences(text: str) -> str:
    """``text`` with its sentences in another order, always the same one, and the white space where it was.

    The GPT-1 paper holds that shuffled sentences destroy the long-range structure that a model learns from; this makes
    the claim testable.
    """
    parts = _SENTENCE_END.split(text)
    sentences = parts[::2]
    Random(len(text)).shuffle(sentences)
    parts[::2] = sentences
    return "".join(parts)
