"""The sidecar of a corpus: ``<prefix>.json`` says what the two binary files hold and which tokenizer made them."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megagpt.errors import DataError

_FORMAT = "megagpt-corpus"
_VERSION = 1
_MAX_BYTES = 16 << 20  # a sidecar is a few kilobytes; anything of this size is something else


@dataclass(frozen=True)
class CorpusInfo:
    """What a corpus is. Words are runs without ASCII white space and bytes are UTF-8, both of the text as it was read,
    before any cleaning, so that perplexities per word and per byte compare across tokenizers."""

    tokenizer_sha256: str
    vocab_size: int
    eot_id: int | None  # the id that ends every document; None where the vocabulary has no such token
    max_id: int  # largest id in the corpus
    n_documents: int
    n_tokens: int
    n_words: int
    n_bytes: int
    bin_sha256: str
    idx_sha256: str
    megagpt_version: str
    settings: dict = field(default_factory=dict)  # how it was made: input, cleaning, counts of skipped lines

    def to_bytes(self) -> bytes:
        """The sidecar's content."""
        return (json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> "CorpusInfo | None":
        """The sidecar at ``path``; None when there is none, as for a corpus that Megatron-LM made.

        Raises DataError when the file is not a sidecar of this version.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise DataError(f"{path} is not a corpus sidecar: it is {path.stat().st_size:,} bytes long")
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{path} is not readable as a corpus sidecar: {error}; prepare the corpus again") from None
        if not isinstance(found, dict) or found.pop("format", None) != _FORMAT:
            raise DataError(f"{path} is not a corpus sidecar; move it away or prepare the corpus again")
        if (version := found.pop("version", None)) != _VERSION:
            raise DataError(f"{path} has format version {version!r} and this release reads version {_VERSION}")
        return cls._checked(found, path)

    @classmethod
    def _checked(cls, found: dict, path: Path) -> "CorpusInfo":
        names = {f.name for f in fields(cls)}
        if missing := sorted(names - {"settings"} - found.keys()):
            raise DataError(f"{path} lacks {', '.join(missing)}; prepare the corpus again")
        for name in names & found.keys():
            value = found[name]
            if name == "settings":
                good = isinstance(value, dict)
            elif name.endswith(("sha256", "version")):
                good = isinstance(value, str)
            else:
                good = (value is None and name == "eot_id") or (type(value) is int and 0 <= value < 1 << 62)
            if not good:
                raise DataError(f"{path}: {name} is {value!r}, which is not possible; prepare the corpus again")
        return cls(**{name: found[name] for name in names & found.keys()})
