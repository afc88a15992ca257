"""Tokenizers: one ``tokenizer.json`` for every kind, whatever it was made from, and its SHA-256 as its name.

A corpus keeps a copy of the file that made it, so what a model was trained with can always be found again.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from megagpt.data.storage import write_atomically
from megagpt.data.vocabularies import NAMES, find_vocabulary, is_folder_with_vocabulary, tokenizer_json
from megagpt.errors import DataError

_MAX_BYTES = 256 << 20  # the largest vocabularies in use take 40 MB
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")


class Tokenizer:
    """Text to ids and back. ``json`` is the content of the tokenizer.json that defines it completely.

    ``sha256`` names it; ``vocab_size`` is the largest id plus one; ``eot_id`` the id that ends a document, or None
    where the vocabulary has no end-of-text token (GPT-1's has none).
    """

    def __init__(self, content: bytes, source: str) -> None:
        if len(content) > _MAX_BYTES:
            raise DataError(f"{source} is {len(content):,} bytes long; a tokenizer.json has at most {_MAX_BYTES:,}")
        self.definition = _parsed(content, source)
        self.json = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = _vocab_size(self.definition, source)
        self._source = source
        known = {token["content"]: token["id"] for token in self.definition.get("added_tokens") or []}
        self.eot_id: int | None = next((known[name] for name in _END_OF_TEXT if name in known), None)

    @cached_property
    def exact(self):
        """The ``tokenizers.Tokenizer``, in which a special token's name in a text is text like any other."""
        import tokenizers

        with _library_errors(self._source):
            exact = tokenizers.Tokenizer.from_str(self.json.decode())
        exact.encode_special_tokens = True  # a document that quotes "<|endoftext|>" does not end there
        return exact

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without any added at its ends."""
        exact = self.exact
        with _library_errors(self._source):
            return exact.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; special tokens by their names."""
        exact = self.exact
        with _library_errors(self._source):
            return exact.decode(list(ids), skip_special_tokens=False)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer.json. Raises StorageError."""
        write_atomically(Path(path), self.json)


def from_file(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer defined by a tokenizer.json. Raises DataError."""
    return Tokenizer(_plain(_read(Path(path)), str(path)), str(path))


def load(spec: str) -> Tokenizer:
    """The tokenizer that ``spec`` names. Raises DataError.

    A tokenizer.json; a folder with vocabulary files (encoder_bpe_40000.json and vocab_40000.bpe, encoder.json and
    vocab.bpe, vocab.json and merges.txt, or tokenizer.json); or ``gpt1`` or ``gpt2``, which are looked for in the
    folders ``vocab/<name>`` here and ``$MEGAGPT_VOCAB/<name>``. ``train:N`` is served by ``megagpt.data.bpe``.
    """
    path = Path(spec)
    if spec in NAMES and not path.exists():
        path = find_vocabulary(spec)
    if path.is_dir():
        if not is_folder_with_vocabulary(path):
            raise DataError(f"{path} has no vocabulary files; it needs tokenizer.json, or vocab.json and merges.txt")
        if (path / "tokenizer.json").exists():
            return from_file(path / "tokenizer.json")
        return Tokenizer(tokenizer_json(path), str(path))
    if not path.exists():
        raise DataError(
            f"tokenizer {spec!r} is neither a file nor known; give gpt1, gpt2, train:N (N the size of the vocabulary), "
            "a tokenizer.json, or a folder with vocabulary files"
        )
    return from_file(path)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(
                f"{path} is {path.stat().st_size:,} bytes long; a tokenizer.json has at most {_MAX_BYTES:,}"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a tokenizer.json") from None


def _parsed(content: bytes, source: str) -> dict:
    try:
        definition = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not a tokenizer.json: {error}") from None
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        hint = "; it looks like a bare vocabulary: give the folder that also holds its merges" if definition else ""
        raise DataError(f"{source} is not a tokenizer.json: it has no model{hint}")
    return definition


def _plain(content: bytes, source: str) -> bytes:
    """``content`` without what adds to a text, cuts or pads it: a corpus holds the text and nothing else."""
    definition = _parsed(content, source)
    additions = ("truncation", "padding", "post_processor")
    if all(definition.get(name) is None for name in additions):
        return content
    definition.update(dict.fromkeys(additions))
    try:
        return json.dumps(definition, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{source} is not a tokenizer.json: it holds half a character (a lone surrogate)") from None


def _vocab_size(definition: dict, source: str) -> int:
    """The largest id plus one. The library accepts any ids, so duplicates and absurd ones are refused here."""
    vocab = definition["model"].get("vocab")
    if isinstance(vocab, dict):
        ids = list(vocab.values())
    elif isinstance(vocab, list):  # a unigram model: ids are positions
        ids = list(range(len(vocab)))
    else:
        raise DataError(f"{source} is not a tokenizer.json: its model has no vocabulary")
    tokens = dict(vocab) if isinstance(vocab, dict) else {}
    added = definition.get("added_tokens") or []
    if not isinstance(added, list):
        raise DataError(f"{source} is not a tokenizer.json: its added tokens are no list")
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or "id" not in token:
            raise DataError(f"{source}: {str(token)[:80]!r} among its added tokens has no content and id")
        if token["content"] not in tokens:
            ids.append(token["id"])
        elif tokens[token["content"]] != token["id"]:
            raise DataError(f"{source}: token {token['content']!r} has two ids")
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise DataError(f"{source}: its vocabulary is empty or has ids that are not whole numbers from 0 on")
    if isinstance(vocab, dict) and len(set(ids)) != len(ids):
        raise DataError(f"{source}: two tokens share an id")
    if max(ids) > 4 * len(ids) + 1024:
        raise DataError(
            f"{source}: id {max(ids):,} in a vocabulary of {len(ids):,} tokens; a model would need that many rows"
        )
    return max(ids) + 1


@contextlib.contextmanager
def _library_errors(source: str) -> Iterator[None]:
    """Turn what ``tokenizers`` raises into a DataError; a panic in it is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        if "TextInputSequence" in str(error) or isinstance(error, UnicodeEncodeError):
            raise DataError("the text holds bytes or half characters that are no Unicode; write it in UTF-8") from None
        raise DataError(f"{source}: the tokenizer failed: {error}") from None
