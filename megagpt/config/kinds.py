"""What a key of a DeepSpeed file may hold: the few kinds of values that the table of keys is made of."""

import math
from collections.abc import Callable
from typing import NamedTuple

AUTO = "auto"
_MOST = 2**63 - 1


class Kind(NamedTuple):
    """What a key may hold."""

    words: str
    fits: Callable[[object], bool]  # of a JSON value
    auto: bool = False  # "auto" is allowed and takes a flag's value
    whole: bool = False  # 5e8 is read as an int


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST <= value <= _MOST


def whole(low: int = 0, *, auto: bool = False) -> Kind:
    words = f"a whole number of at least {low}"
    return Kind(words, lambda v: _number(v) and v == int(v) and v >= low, auto, whole=True)


def real(low: float = 0.0, high: float = math.inf, *, auto: bool = False) -> Kind:
    words = f"a number of at least {low:g}" if high == math.inf else f"a number between {low:g} and {high:g}"
    return Kind(words, lambda v: _number(v) and low <= v <= high, auto)


def one_of(*values) -> Kind:
    words = " or ".join(repr(v) if isinstance(v, str) else str(v) for v in values)
    numbers = all(isinstance(v, int) for v in values)
    return Kind(words, lambda v: not isinstance(v, bool) and v in values, whole=numbers)


def only(value: bool, why: str) -> Kind:
    """A switch that DeepSpeed knows and MegaGPT needs in one position."""
    return Kind(f"{str(value).lower()}: {why}", lambda v: v is value)


SWITCH = Kind("true or false", lambda v: isinstance(v, bool))
AUTO_SWITCH = SWITCH._replace(auto=True)
TEXT = Kind("a text", lambda v: isinstance(v, str) and v != "")
NAMES = Kind("a list of names", lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v))
# DeepSpeed aligns what it gathers to pairs of 2-byte elements.
EVEN = Kind("an even whole number", lambda v: _number(v) and v >= 0 and v % 2 == 0, whole=True)
BETAS = Kind(
    "two numbers of at least 0 and below 1",
    lambda v: isinstance(v, list) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v),
    auto=True,
)
DTYPE = one_of("fp32", "fp16", "bf16")
TABLE = Kind("an object in braces", lambda v: isinstance(v, dict))
