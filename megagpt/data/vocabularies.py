"""Published vocabulary files as a ``tokenizer.json``: GPT-1's, GPT-2's, and any vocab.json with merges.txt.

GPT-1 cut text into words with spaCy's English rules before its byte pairs; the pattern here follows those rules as
far as a regular expression can: contractions apart from their word ("don't" is "do" and "n't"), common abbreviations,
initials and numbers whole, runs of dots and hyphens whole, other punctuation one by one, a line end as a token of its
own.
"""

import json
import os
from pathlib import Path

from megagpt.errors import DataError

NAMES = ("gpt1", "gpt2")
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"

_PAIRS = (  # vocabulary, merges
    ("encoder_bpe_40000.json", "vocab_40000.bpe"),
    ("encoder.json", "vocab.bpe"),
    ("vocab.json", "merges.txt"),
)
_CONTRACTION = r"(?:s|m|d|re|ve|ll)(?![\p{L}\p{N}])"
_LETTER = r"[\p{L}\p{M}\p{N}_]"
WORDS = "|".join(
    [
        r"\n",
        r"(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|col|capt|lt|rev|vs|etc|mt|inc)\.(?![\p{L}\p{N}])",
        r"(?:\p{L}\.){2,}",  # u.s. a.m.
        r"\p{N}+(?:[.,]\p{N}+)+",  # 1,000.5
        r"\p{L}+?(?=n't(?![\p{L}\p{N}]))|n't(?![\p{L}\p{N}])",
        rf"'{_CONTRACTION}",
        rf"{_LETTER}+(?:'(?!{_CONTRACTION}){_LETTER}+)*",  # o'clock
        r"\.{2,}|-{2,}",
        r"[^\s\p{L}\p{M}\p{N}_]",
    ]
)


def find_vocabulary(name: str) -> Path:
    """The folder with the files of ``gpt1`` or ``gpt2``. Raises DataError that says where they are looked for."""
    folders = [Path("vocab") / name]
    if os.environ.get("MEGAGPT_VOCAB"):
        folders.append(Path(os.environ["MEGAGPT_VOCAB"]) / name)
    for folder in folders:
        if is_folder_with_vocabulary(folder):
            return folder
    files = " and ".join(_PAIRS[NAMES.index(name)])
    raise DataError(
        f"tokenizer {name!r}: its vocabulary is not in {' or '.join(map(str, folders))}; put {files} (or its "
        "tokenizer.json) there, or give the folder that has them as --tokenizer FOLDER"
    )


def is_folder_with_vocabulary(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or _pair(folder) is not None


def _pair(folder: Path) -> tuple[Path, Path] | None:
    for vocabulary, merges in _PAIRS:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return folder / vocabulary, folder / merges
    return None


def tokenizer_json(folder: Path) -> bytes:
    """The tokenizer of the vocabulary and merges in ``folder``: word-end or byte-level, as the vocabulary shows."""
    vocabulary_path, merges_path = _pair(folder)
    try:
        vocabulary = json.loads(vocabulary_path.read_bytes())
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder} cannot be read as a vocabulary: {error}") from None
    if not isinstance(vocabulary, dict):
        raise DataError(f"{vocabulary_path} is not a vocabulary: it does not map tokens to ids")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for pair in merges:
        if len(pair) != 2 or pair[0] not in vocabulary or pair[1] not in vocabulary:
            raise DataError(f"{merges_path}: {' '.join(pair)!r} is not two tokens of {vocabulary_path.name}")
    word_end = any(token.endswith("</w>") for token in vocabulary)
    return definition(vocabulary, merges, word_end=word_end)


def definition(vocabulary: dict[str, int], merges: list[tuple[str, str]], *, word_end: bool) -> bytes:
    """A tokenizer.json of a byte-pair model; ``word_end`` as in GPT-1, else byte-level as in GPT-2."""
    from tokenizers import AddedToken, Tokenizer, models

    special = [name for name in (UNKNOWN, END_OF_TEXT) if name in vocabulary]
    unknown = {"unk_token": UNKNOWN} if word_end and UNKNOWN in vocabulary else {}
    suffix = {"end_of_word_suffix": "</w>"} if word_end else {}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **unknown, **suffix))
    except Exception as error:
        raise DataError(f"the vocabulary and its merges do not fit together: {error}") from None
    set_text_rules(tokenizer, word_end=word_end)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return tokenizer.to_str().encode()


def set_text_rules(tokenizer, *, word_end: bool) -> None:
    """Give a ``tokenizers.Tokenizer`` the rules by which text is cut before byte pairs are joined, and joined again."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    if word_end:
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
