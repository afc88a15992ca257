"""A batch script of ``slurm/`` with one run's settings and arguments written into it.

The body is the shipped script's own; only the lines that sbatch reads and the arguments differ. What a user types ends
up in a shell script, so every argument is quoted, and what stands in an ``#SBATCH`` line may hold harmless characters
alone.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megagpt.errors import ConfigError

HOME = Path(__file__).resolve().parent.parent.parent
KINDS = ("pretrain", "finetune", "array", "preprocess", "container")

_TEMPLATE = """\
#!/bin/bash
# slurm/{{ kind }}.sbatch with settings and arguments of one run, as megagpt slurm wrote it.
{% for name, value in options.items() %}
#SBATCH --{{ name }}{{ "" if value is none else "=" ~ value }}
{% endfor %}

export MEGAGPT_HOME={{ home | quote }}
{% for name, value in variables.items() %}
export {{ name }}={{ value | quote }}
{% endfor %}
{% if arguments %}
set -- {{ arguments | map("quote") | join(" ") }} "$@"
{% endif %}

{{ body }}
"""
_HARMLESS = re.compile(r"[\w.,:=@%/+*()\[\]&|!~-]+", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def render(
    kind: str,
    options: Mapping[str, str | None],
    variables: Mapping[str, str],
    arguments: Sequence[str],
    home: Path = HOME,
) -> str:
    """The script ``slurm/<kind>.sbatch`` with sbatch's ``options`` changed or added, and ``arguments`` before its own.

    An option without a value, such as exclusive, has None. Raises ConfigError for what cannot stand in a script.
    """
    import jinja2

    own, body = _shipped(kind, home)
    for name, value in options.items():
        if not _HARMLESS.fullmatch(name) or (value is not None and not _HARMLESS.fullmatch(value)):
            shown = name if value is None else f"{name}={value}"
            raise ConfigError(
                f"--{shown[:80]!r} cannot stand in a batch script: letters, digits and .,:=@%/+*()[]&|!~_- are allowed"
            )
    for name in variables:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"{name[:80]!r} is no name of a variable; give NAME=VALUE, as in IMAGE=megagpt.sif")
    for text in (*arguments, *variables.values()):
        if "\0" in text:
            raise ConfigError("an argument holds a NUL character, which no program can be given; take it out")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["quote"] = shlex.quote
    values = {"kind": kind, "home": str(home), "body": body, "arguments": list(arguments)}
    return environment.from_string(_TEMPLATE).render(options={**own, **options}, variables=dict(variables), **values)


def _shipped(kind: str, home: Path) -> tuple[dict[str, str | None], str]:
    """The options in the shipped script's ``#SBATCH`` lines, and what follows the last of them."""
    path = home / "slurm" / f"{kind}.sbatch"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; the scripts are part of the repository: install it with pip install --editable"
        ) from None
    head, _, body = text.rpartition("#SBATCH ")
    last, _, body = body.partition("\n")
    lines = [line.removeprefix("#SBATCH ") for line in head.splitlines() if line.startswith("#SBATCH ")]
    words = [word.removeprefix("--").partition("=") for line in [*lines, last] for word in line.split()]
    return {name: value if equals else None for name, equals, value in words}, body.strip("\n")


def safe_name(text: str) -> str:
    """``text`` as the name of a job: letters, digits and ._- , at most 60 of them, the first no hyphen or dot."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("-._")[:60] or "run"
