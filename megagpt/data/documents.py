"""From a block to its documents' texts, with a reason for everything that is not one."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from megagpt.data.readers import Block
from megagpt.data.streams import MAX_LINE
from megagpt.errors import DataError, nearest

_BLANK_LINE = re.compile(r"\n(?:[ \t]*\n)+")
_SHOWN = 3  # examples kept of each block
_MAX_KEYS = 1000  # different keys remembered: lines may have any

NO_KEY, EMPTY, REPLACED = "key not found", "empty", "not UTF-8, damaged characters replaced"


@dataclass
class Skipped:
    """Counts of what was not made into documents, by reason, with the first few places. REPLACED only counts."""

    counts: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    keys: Counter = field(default_factory=Counter)  # of JSON objects that lack the wanted one

    def note(self, reason: str, place: str = "") -> None:
        self.counts[reason] += 1
        if place and len(self.examples) < _SHOWN:
            self.examples.append(f"{place}: {reason}")

    def add(self, other: "Skipped") -> None:
        self.counts += other.counts
        self.keys += other.keys
        if len(self.keys) > _MAX_KEYS:
            self.keys = Counter(dict(self.keys.most_common(_MAX_KEYS // 2)))
        self.examples += other.examples[: _SHOWN - len(self.examples)]

    def to_dict(self) -> dict:
        return {"counts": dict(self.counts), "examples": self.examples, "keys": dict(self.keys)}

    @classmethod
    def from_dict(cls, found: dict) -> "Skipped":
        return cls(Counter(found["counts"]), list(found["examples"]), Counter(found["keys"]))

    @property
    def bad(self) -> int:
        """Lines or rows that should have been documents."""
        return sum(n for reason, n in self.counts.items() if reason not in (EMPTY, REPLACED))

    def __str__(self) -> str:
        return ", ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common())


def no_documents(skipped: Skipped, key: str) -> DataError:
    """What to tell about an input in which nothing is a document."""
    reasons = str(skipped) or "the files hold nothing but white space"
    first = f"; the first: {skipped.examples[0]}" if skipped.examples else ""
    hint = ""
    if skipped.counts[NO_KEY]:
        keys = [name for name, _ in skipped.keys.most_common(8)]
        listed = ", ".join(keys) or "none"
        hint = f"; there is no key {key!r}{nearest(key, keys)}, the keys are {listed}: choose one with --json_key"
    return DataError(f"the input has no documents: {reasons}{first}{hint}")


def texts(block: Block, key: str, skipped: Skipped) -> Iterator[str]:
    """The documents of ``block``; ``key`` is that of JSON lines. What is no document is noted in ``skipped``."""
    for line in block.too_long:
        skipped.note(f"line longer than {MAX_LINE >> 20} MiB", f"{block.origin}:{line}")
    for text in _KINDS[block.kind](block, key, skipped):
        if text and not text.isspace():
            yield text
        elif block.begins and block.ends:
            skipped.note(EMPTY)
        else:  # white space within a long document
            yield text


def _json_lines(block: Block, key: str, skipped: Skipped) -> Iterator[str]:
    for number, line in enumerate(block.data.split(b"\n"), block.line):
        if line and not line.isspace():
            text, reason = _json_text(line, key, skipped.keys)
            if text is None:
                skipped.note(reason, f"{block.origin}:{number}")
            else:
                yield text


def _json_text(line: bytes, key: str, keys: Counter) -> tuple[str | None, str]:
    """The text of one JSON line, or None and why there is none."""
    try:
        found = _loads(line.removeprefix(b"\xef\xbb\xbf"))
        if not isinstance(found, dict):
            return None, "not a JSON object"
        if key not in found:
            keys.update(name[:40] for name in list(found)[:20])
            return None, NO_KEY
        text = found[key]
        if not isinstance(text, str):
            return None, "text is not a string"
        text.encode()
    except UnicodeEncodeError:
        return None, "half of a surrogate pair"
    except (ValueError, RecursionError):
        return None, "bad JSON"
    return text, ""


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _loads(line: bytes):
    """Strict JSON: no NaN, nothing after the value. Without orjson several times slower."""
    try:
        import orjson
    except ImportError:
        return json.loads(line.decode(), parse_constant=_refuse)
    return orjson.loads(line)


def head(block: Block, n: int) -> str:
    """The first ``n`` characters of a document of which ``block`` holds a later part."""
    return _decoded(block.head, True, Skipped())[:n]


def _decoded(data: bytes, begins: bool, skipped: Skipped) -> str:
    """Text with Unix line ends and without a byte order mark."""
    if begins:
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        skipped.note(REPLACED)
        text = data.decode(errors="replace")
    return text.replace("\r\n", "\n")


def _lines(block: Block, key: str, skipped: Skipped) -> Iterator[str]:
    lines = _decoded(block.data, True, skipped).split("\n")
    # files with a byte order mark may have been put one behind the other
    return (line.removeprefix("\ufeff") for line in (lines[:-1] if not lines[-1] else lines))


def _paragraphs(block: Block, key: str, skipped: Skipped) -> Iterator[str]:
    for paragraph in _BLANK_LINE.split(_decoded(block.data, True, skipped)):
        if text := paragraph.strip("\n"):
            yield text


def _files(block: Block, key: str, skipped: Skipped) -> Iterator[str]:
    return (_decoded(data, block.begins, skipped) for data in block.data)


def _rows(block: Block, key: str, skipped: Skipped) -> Iterator[str]:
    for text in block.data:
        if text is None:
            skipped.note("row without text", block.origin)
        else:
            yield text


_KINDS = {"jsonl": _json_lines, "lines": _lines, "paragraphs": _paragraphs, "files": _files, "texts": _rows}
