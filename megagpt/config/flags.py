"""Flags from a dataclass: names with ``-`` or ``_``, and one line of text for whatever is wrong with them."""

import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, Field, fields
from typing import Annotated, TypeVar, get_origin, get_type_hints

from megagpt.errors import ConfigError, nearest

Settings = TypeVar("Settings")

_FLAG = re.compile(r"--?[A-Za-z]")  # a negative number is a value
_MISFIT = re.compile(r"Error parsing (--\w+): no type matching \{?(.+?)\}? could be instantiated from \[(.*)\]")

_CHOICE = re.compile(r"invalid choice '(.*?)' for argument '(--\w+)'. Expected one of \((.*)\)")


def parse_flags(
    cls: type[Settings],
    argv: Sequence[str] | None,
    *,
    prog: str,
    aliases: Mapping[str, str] | None = None,
    bare: Mapping[str, str | None] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> Settings:
    """An instance of the dataclass ``cls`` from ``argv`` (the process's own arguments when None).

    ``aliases`` maps other names of a flag to its name, ``bare`` the flags that may stand without a value to the value
    they then have, or to None when they then mean nothing, ``elsewhere`` names of other programs' flags to what serves
    here in their place, for the message. ``--local_rank``, which launchers add anywhere, is dropped.
    A field's trailing underscore, which keeps it apart from a word of Python's, is not part of its flag: ``from_`` is
    ``--from``. ``--help`` prints and exits.
    Raises ConfigError for an unknown flag, a missing one or a value that does not fit.
    """
    import tyro

    args = _normalise(sys.argv[1:] if argv is None else argv, aliases or {}, bare or {})
    wants_help = any(arg in ("-h", "--help") for arg in args)
    if not wants_help:
        _refuse_unknown(args, list(map(_flag, fields(cls))), prog, elsewhere or {})
        _refuse_missing(cls, args, prog)
        _refuse_repeated(cls, args)
    else:
        _hide_empty_defaults(cls)
    _name_flags(cls)
    # Every rank parses the same flags; one of them answers --help.
    silent = wants_help and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0"
    messages = io.StringIO()
    try:
        with redirect_stderr(messages):
            settings, unknown = tyro.cli(
                cls,
                args=args,
                prog=prog,
                use_underscores=True,
                return_unknown_args=True,
                console_outputs=not silent,
                # Every switch is off by default: its opposite would say nothing.
                config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_sentence(messages.getvalue())}; {prog} --help lists the flags") from None
    if unknown:
        raise ConfigError(f"{unknown[0]!r} belongs to no flag; {prog} --help lists the flags")
    return settings


def _flag(field: Field) -> str:
    return f"--{field.name.rstrip('_')}"


def _name_flags(cls: type) -> None:
    """Tell tyro the flags of fields with a trailing underscore."""
    import tyro

    kinds = get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        if field.name.endswith("_"):
            cls.__annotations__[field.name] = Annotated[kinds[field.name], tyro.conf.arg(name=_flag(field)[2:])]


def _hide_empty_defaults(cls: type) -> None:
    """Let ``--help`` name the defaults that say something: None means that another flag or file decides."""
    import tyro

    empty = ("None", "", "''")
    hint = tyro.conf.arg(help_behavior_hint=lambda default: "" if default in empty else f"(default: {default})")
    kinds = get_type_hints(cls, include_extras=True)
    # On the class itself: tyro reads the help texts in its source.
    cls.__annotations__ = {name: Annotated[kind, hint] for name, kind in kinds.items()}


def _normalise(argv: Sequence[str], aliases: Mapping[str, str], bare: Mapping[str, str | None]) -> list[str]:
    """Flags under their own names with underscores, without ``--local_rank``, each followed by its value."""
    args: list[str] = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            args.append(arg)
            continue
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        has_value = bool(equals) or (bool(rest) and not _FLAG.match(rest[0]))
        if name == "local_rank":
            if has_value and not equals:
                rest.pop(0)
            continue
        if name in bare and not has_value:
            equals, value = bare[name] is not None, bare[name]
            if not equals:
                continue
        args.append(f"--{aliases.get(name, name)}")
        if equals:
            args.append(value)
    return args


def _refuse_unknown(args: Sequence[str], flags: Sequence[str], prog: str, elsewhere: Mapping[str, str]) -> None:
    def hint(flag: str) -> str:
        return f" (here: {elsewhere[flag[2:]]})" if flag[2:] in elsewhere else nearest(flag, flags)

    unknown = [arg[:80] for arg in args if _FLAG.match(arg) and arg not in flags]
    if unknown:
        listed = ", ".join(f"{flag}{hint(flag)}" for flag in unknown[:5])
        raise ConfigError(f"unknown flag {listed}; {prog} --help lists the flags")


def _refuse_missing(cls: type, args: Sequence[str], prog: str) -> None:
    needed = [_flag(field) for field in fields(cls) if field.default is MISSING]
    absent = [flag for flag in needed if flag not in args]
    if absent:
        raise ConfigError(f"{prog} needs {' and '.join(absent)}; {prog} --help lists the flags")


def _refuse_repeated(cls: type, args: Sequence[str]) -> None:
    """Of a flag given twice the later value counts; of a list that would silently drop what the earlier one named."""
    for field in fields(cls):
        flag = _flag(field)
        if get_origin(field.type) is tuple and args.count(flag) > 1:
            raise ConfigError(f"{flag} is given {args.count(flag)} times; give it once, with all values behind it")


def _sentence(box: str) -> str:
    """The message inside the frame that tyro prints, as one line."""
    lines = []
    for line in box.splitlines():
        text = line.strip(" │╭╮╰╯─")
        if not text and lines:  # a rule, below which the help text is repeated
            break
        if "│" in line:
            lines.append(text)
    message = " ".join(" ".join(lines).split()).rstrip(". ") or "the flags could not be read"
    return _CHOICE.sub(_unknown_choice, _MISFIT.sub(r"\1 takes \2, not \3", message))


def _unknown_choice(match: re.Match) -> str:
    found, flag, choices = match.groups()
    known = [choice.strip("' ") for choice in choices.split(",")]
    if "None" in known:  # of a flag that may be left out, for which tyro keeps no order
        known = sorted(set(known) - {"None"})
    return f"{flag} {found!r} is unknown{nearest(found, known)}; choose one of {', '.join(known)}"
