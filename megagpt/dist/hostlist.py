"""Slurm's compressed lists: host names as in ``n[1-3,07],login`` and tasks a node as in ``2(x3),1``.

Written out here because ``scontrol show hostnames`` is missing inside containers.
"""

import re
from itertools import product

from megagpt.errors import ConfigError

_MOST = 1_000_000  # names; no cluster has more, and a hostile list must not fill the memory
_RANGE = re.compile(r"(\d{1,12})(?:-(\d{1,12}))?")
_TASKS = re.compile(r"(\d{1,7})(?:\(x(\d{1,7})\))?")


def expand_hostlist(text: str) -> list[str]:
    """The host names that ``text`` stands for, in Slurm's order: ``n[1-2,07]`` is n1, n2, n07.

    A number keeps the zeros of its range's first number: ``n[08-10]`` is n08, n09, n10. With several brackets in a name
    the last one varies fastest. Raises ConfigError for anything else.
    """
    names: list[str] = []
    for word in _split(text):
        parts = re.split(r"\[([^\[\]]*)\]", word)  # literal, ranges, literal, ranges, ..., literal
        if any(set(literal) & set("[], \t\n") for literal in parts[::2]) or not word:
            raise _malformed(text)
        choices = [[part] if i % 2 == 0 else _numbers(part, text) for i, part in enumerate(parts)]
        total = len(names)
        size = 1
        for choice in choices:
            size *= len(choice)
        if total + size > _MOST:
            raise ConfigError(f"the host list {_short(text)} names more than {_MOST:,} hosts; give a real one")
        names.extend("".join(combination) for combination in product(*choices))
    return names


def expand_tasks(text: str) -> list[int]:
    """Tasks on each node: ``2(x3),1`` is [2, 2, 2, 1]. Raises ConfigError for anything else."""
    tasks: list[int] = []
    for word in text.split(","):
        match = _TASKS.fullmatch(word)
        if not match:
            raise ConfigError(f"{_short(text)} is no list of tasks a node, as 2(x3),1 is")
        times = int(match[2] or 1)
        if len(tasks) + times > _MOST:
            raise ConfigError(f"{_short(text)} names more than {_MOST:,} nodes; give a real list")
        tasks.extend([int(match[1])] * times)
    return tasks


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    words, depth = [""], 0
    for char in text.strip():
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            words.append("")
        else:
            words[-1] += char
    return words


def _numbers(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        match = _RANGE.fullmatch(item)
        if not match:
            raise _malformed(text)
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first) or int(last) - int(first) >= _MOST:
            raise _malformed(text)
        numbers.extend(f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    return numbers


def _malformed(text: str) -> ConfigError:
    return ConfigError(f"{_short(text)} is no list of hosts as Slurm writes it, like n[1-3,07]")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
