"""Reading a DeepSpeed file: strict JSON, HJSON (JSON with comments), or base64 of either as the autotuner passes it."""

import base64
import binascii
import json
from pathlib import Path

from megagpt.errors import ConfigError, nearest

_LARGEST = 1 << 20  # bytes; a settings file has a few thousand


def read(source: str) -> dict:
    """The object in the file ``source``, or in ``source`` itself when it is base64. Keys with null are left out.

    Raises ConfigError when there is no such file, or it is no JSON object, or a key occurs twice.
    """
    name = name_of(source)
    value = _parse(_text(source, name), name)
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: holds {type(value).__name__}, not a JSON object in braces")
    return _without_null(value)


def name_of(source: str) -> str:
    """``source`` for a message: on one line and not longer than a path."""
    name = source if source.isprintable() else repr(source)
    return name if len(name) <= 200 else f"{name[:40]}..."


def _text(source: str, name: str) -> str:
    try:
        path = Path(source)
        if path.is_file():
            if path.stat().st_size > _LARGEST:
                raise ConfigError(f"{name}: has {path.stat().st_size:,} bytes; a DeepSpeed file has a few thousand")
            return path.read_bytes().decode("utf-8-sig")
        if path.is_dir():
            raise ConfigError(f"{name}: is a folder; name one of the files in it")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}:{error.start}: not UTF-8 text") from None
    except (OSError, ValueError) as error:
        if not _is_base64(source):
            raise ConfigError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if _is_base64(source):
        return base64.urlsafe_b64decode(source).decode()
    siblings = [str(p) for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
    raise ConfigError(f"{name}: no such file{nearest(source, siblings)}")


def _is_base64(source: str) -> bool:
    """True for base64 of something that starts like an object: no file name of a user's looks like that."""
    try:
        return base64.urlsafe_b64decode(source).decode().lstrip().startswith("{")
    except (binascii.Error, ValueError):
        return False


def _parse(text: str, name: str) -> object:
    if not text.strip():
        raise ConfigError(f"{name}: is empty; {{}} is the shortest DeepSpeed file")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except _Refused as error:
        raise ConfigError(f"{name}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except ValueError as error:
        where = f":{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"{name}{where}: {getattr(error, 'msg', error)}"
    import hjson

    try:
        return hjson.loads(text, object_pairs_hook=_unique)
    except _Refused as error:
        raise ConfigError(f"{name}: {error}") from None
    except (ValueError, OverflowError, RecursionError, IndexError):
        raise ConfigError(f"{reason}; it is neither JSON nor HJSON") from None


class _Refused(Exception):
    """Well-formed, and still not to be accepted."""


def _unique(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"the key {json.dumps(twice[:80])} occurs twice in one object; keep one of them")
    return values


def _refuse_constant(constant: str):
    raise _Refused(f"{constant} is no JSON number")


def _without_null(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return value
