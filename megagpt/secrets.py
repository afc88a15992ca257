"""Keys and passwords stay out of what a run writes and prints."""

import os
import re
from collections.abc import Mapping

HIDDEN = "(hidden)"
_SECRET = re.compile(r"token|secret|passw|credential|api_?key|access_?key|private_?key", re.IGNORECASE)
_NO_SECRET = re.compile(r"tokeni[sz]er|tokens|tokeni[sz]e", re.IGNORECASE)  # max_tokens, TOKENIZERS_PARALLELISM
_SHORTEST = 8  # characters: a shorter value would be found in innocent text


def names_a_secret(name: str) -> bool:
    """Whether a variable, flag or key of this name holds one."""
    return bool(_SECRET.search(_NO_SECRET.sub("", name)))


def hide(text: str, env: Mapping[str, str] = os.environ) -> str:
    """``text`` without the values of the environment's secrets."""
    values = {value for name, value in env.items() if len(value) >= _SHORTEST and names_a_secret(name)}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def without_secrets(value):
    """JSON's data with what lies under a secret's name replaced; a list of words is taken for a command line."""
    if isinstance(value, dict):
        return {k: HIDDEN if _holds_one(k, v) else without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        words = [without_secrets(item) for item in value]
        return [_word(words[i - 1] if i else None, word) for i, word in enumerate(words)]
    return value


def _holds_one(key: object, value: object) -> bool:
    return isinstance(key, str) and names_a_secret(key) and isinstance(value, str) and bool(value)


def _word(before: object, word: object):
    """A word of a command line: --api_key VALUE, --api_key=VALUE or API_KEY=VALUE."""
    if not isinstance(word, str):
        return word
    name, equals, value = word.partition("=")
    if equals and value and names_a_secret(name):
        return f"{name}={HIDDEN}"
    is_value = isinstance(before, str) and before.startswith("-") and "=" not in before and not word.startswith("-")
    return HIDDEN if is_value and names_a_secret(before) else word
