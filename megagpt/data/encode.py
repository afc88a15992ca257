"""Texts to ids at speed, with exactly the ids of the ``tokenizers`` library.

Where the vocabulary is byte-level and tiktoken is installed, tiktoken does the work, several times faster. It orders
merges by the id of what they make instead of by their position in a list, so it is used only where both orders are
the same, and one text in about a megabyte has its start compared with the library.
"""

import re
from collections.abc import Iterator
from functools import cached_property

from megagpt.data.tokenizer import Tokenizer

# GPT-2's pattern, with possessive quantifiers where they change nothing but the time taken
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_COMPARED = 4096  # characters of a text that both libraries encode, once in every _COMPARED_EVERY
_COMPARED_EVERY = 1 << 20
_PIECE = 1 << 20  # characters that are encoded at once: the libraries need many bytes for each
_SAFE_CUT = re.compile(r"[A-Za-z0-9](?= [A-Za-z0-9])")


def pieces(text: str, size: int = _PIECE) -> Iterator[str]:
    """``text`` in pieces of about ``size`` characters that can be encoded one by one.

    The cuts are between a letter and a single space before a letter, where every usual rule ends a word anyway. Text
    without such a place is cut after four times the size.
    """
    begin = 0
    while len(text) - begin > size:
        cut = _SAFE_CUT.search(text, begin + size - 1, begin + 4 * size)
        end = cut.end() if cut else begin + 4 * size
        yield text[begin:end]
        begin = end
    yield text[begin:]


class Encoder:
    """Encodes texts with one tokenizer. ``fast`` says whether tiktoken does it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        tokenizer.exact  # noqa: B018 the library judges the definition before anything here believes it
        self._tiktoken = _tiktoken(tokenizer)
        self._since_compared = _COMPARED_EVERY  # characters

    @property
    def fast(self) -> bool:
        return self._tiktoken is not None

    def __call__(self, text: str, begins: bool = True) -> Iterator[list[int]]:
        """The ids of ``text``, which ``begins`` or continues a document, in lists of a bounded number.

        Raises DataError where the tokenizer cannot encode it.
        """
        if self.fast and self._since_compared >= _COMPARED_EVERY:
            self._since_compared = 0
            start = text[:_COMPARED]
            if self._fast_ids(start) != self._tokenizer.encode(start):
                self._tiktoken = None
        self._since_compared += len(text)
        for piece in pieces(text):
            if self.fast:
                yield self._fast_ids(piece)
            elif begins or not self._adds_space:
                yield self._tokenizer.encode(piece)
            else:
                yield self._tokenizer.encode(piece.removeprefix(" "))
            begins = False

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before whatever it is given, as those of Llama's kind do."""
        encode = self._tokenizer.encode
        return encode("a") + encode(" b") != encode("a b") == encode("a") + encode("b")

    def _fast_ids(self, text: str) -> list[int]:
        try:
            return self._tiktoken.encode_ordinary(text)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # a panic, as on very long runs of one character
            return self._tokenizer.encode(text)


def _tiktoken(tokenizer: Tokenizer):
    """A ``tiktoken.Encoding`` that gives the same ids as ``tokenizer``; None where there is no such thing."""
    try:
        import tiktoken
    except ImportError:
        return None
    if (ranks := _byte_ranks(tokenizer.definition)) is None:
        return None
    return tiktoken.Encoding(tokenizer.sha256, pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})


def _byte_ranks(definition: dict) -> dict[bytes, int] | None:
    """{bytes: id} of a byte-level vocabulary cut by GPT-2's rules; None for anything else."""
    model, cut = definition["model"], definition.get("pre_tokenizer") or {}
    plain = {"type": "BPE", "dropout": None, "byte_fallback": False, "ignore_merges": False}
    if "merges" not in model or any(model.get(name, value) != value for name, value in plain.items()):
        return None
    if any(model.get(name) for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")):
        return None
    if definition.get("normalizer") is not None or cut.get("type") != "ByteLevel":
        return None
    if cut.get("add_prefix_space") or not cut.get("use_regex", True):
        return None
    added = definition.get("added_tokens") or []
    if not all(token.get("special") for token in added):
        return None
    return _ranks_in_merge_order(model, {token["content"] for token in added})


def _ranks_in_merge_order(model: dict, special: set[str]) -> dict[bytes, int] | None:
    """The ids of all bytes and merged tokens, if ids rise in the order of the merges and nothing else has one."""
    alphabet, vocab = byte_alphabet(), model["vocab"]
    ids = {token: i for token, i in vocab.items() if token not in special}
    last = max((ids.get(character, -1) for character in alphabet), default=-1)
    for merge in model["merges"]:
        made = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "")
        if ids.get(made, -1) <= last:
            return None
        last = ids[made]
    if len(ids) != len(alphabet) + len(model["merges"]) or not alphabet.keys() <= ids.keys():
        return None
    return {bytes(alphabet[character] for character in token): i for token, i in ids.items()}


def byte_alphabet() -> dict[str, int]:
    """The 256 characters that stand for bytes in byte-level vocabularies (openai/gpt-2 src/encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
