"""``megagpt slurm render|submit|status``: batch scripts from flags, and what becomes of the jobs."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError, nearest
from megagpt.tools.slurm_script import KINDS, render, safe_name
from megagpt.tools.slurm_status import lines


@dataclass(frozen=True)
class JobSettings:
    """A batch script for Slurm: megagpt slurm submit --nodes 2 -- --model gpt1 --data data/books --run_dir runs/gpt1"""

    kind: Literal[KINDS] = "pretrain"  # which script of slurm/
    job_name: str | None = None  # megagpt-RUN_DIR unless given
    nodes: int | None = None  # machines
    ranks_per_node: int | None = None  # processes a machine, as many as GPUs by default
    gpus_per_node: int | None = None  # GPUs a machine
    cpus_per_task: int | None = None  # cores a process
    time: str | None = None  # limit, as in 24:00:00 or 2-12
    partition: str | None = None  # these pass to sbatch as they are
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    array: str | None = None  # runs of an array, as in 1-5
    mem: str | None = None  # memory a node; 0 is all of it
    exclude: str | None = None  # hosts not to run on
    exclusive: bool = False  # share the nodes with no other job
    signal: str | None = None  # sbatch's --signal; the scripts have B:USR1@300, five minutes before the limit, or @120
    output: str | None = None  # the log; %x is the job's name, %j its number
    sbatch: tuple[str, ...] = ()  # other options of sbatch: mail-type=END hint=nomultithread
    set: tuple[str, ...] = ()  # variables of the script: DS_CONFIG=... IMAGE=... SWEEP=... PYTHON=...
    dry_run: bool = False  # show the script, submit nothing


@dataclass(frozen=True)
class StatusSettings:
    """What became of runs: megagpt slurm status runs/gpt1; without a folder, the queue."""

    run_dir: Positional[tuple[str, ...]] = ()
    """folders of runs"""


_OWN = ("kind", "ranks_per_node", "gpus_per_node", "sbatch", "set", "dry_run")  # handled one by one


def slurm_main(argv: Sequence[str] | None = None) -> int:
    """Run ``megagpt slurm``; its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {"render": _render, "submit": _submit, "status": _status}
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: megagpt slurm render|submit [FLAGS] -- ARGUMENTS OF THE RUN, or megagpt slurm status [RUN_DIR...]"
        )
        return 0
    if args[0] not in commands:
        raise ConfigError(
            f"unknown command {args[0][:80]!r}{nearest(args[0][:80], commands)}; see megagpt slurm --help"
        )
    return commands[args[0]](args[1:]) or 0


def script(argv: Sequence[str], command: str) -> tuple[str, JobSettings]:
    """The batch script for ``FLAGS -- ARGUMENTS``, and the flags."""
    at = argv.index("--") if "--" in argv else len(argv)
    settings = parse_flags(JobSettings, argv[:at], prog=f"megagpt slurm {command}")
    arguments = list(argv[at + 1 :])
    variables = dict(_assignment(word) for word in settings.set)
    return render(settings.kind, _options(settings, arguments), variables, arguments), settings


def _options(settings: JobSettings, arguments: Sequence[str]) -> dict[str, str | None]:
    options: dict[str, str | None] = {"job-name": safe_name(settings.job_name or _default_name(settings, arguments))}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in _OWN or value in (None, False):
            continue
        if field.name != "job_name":
            options[field.name.replace("_", "-")] = None if value is True else str(value)
    ranks = settings.ranks_per_node or settings.gpus_per_node
    if ranks:
        options["ntasks-per-node"] = str(ranks)
    if settings.gpus_per_node is not None:
        options["gpus-per-node"] = str(settings.gpus_per_node)
    for word in settings.sbatch:
        name, equals, value = word.removeprefix("--").partition("=")
        options[name] = value if equals else None
    return options


def _default_name(settings: JobSettings, arguments: Sequence[str]) -> str:
    """After the folder or the corpus that the run makes."""
    place = _value_of(arguments, "run_dir", "output")
    return f"megagpt-{settings.kind if place is None else Path(place).name}"


def _value_of(arguments: Sequence[str], *names: str) -> str | None:
    """The value that ``arguments`` give to the first flag of ``names``, however it is spelt."""
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in names:
            return value if equals else "".join(arguments[i + 1 : i + 2])
    return None


def _assignment(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"--set {word[:80]!r} is not NAME=VALUE, as in IMAGE=megagpt.sif")
    return name, value


def _render(argv: Sequence[str]) -> None:
    sys.stdout.write(script(argv, "render")[0])


def _submit(argv: Sequence[str]) -> int:
    text, settings = script(argv, "submit")
    if settings.dry_run:
        sys.stdout.write(text)
        return 0
    program = shutil.which("sbatch")
    if program is None:
        raise ConfigError("sbatch is not on the PATH; submit on a login node of the cluster, or see --dry_run")
    done = subprocess.run([program, "--parsable"], input=text.encode("utf-8", "surrogateescape"), capture_output=True)
    told = done.stderr.decode(errors="replace").strip()
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {' '.join(told.split())[-600:]}")
    job = done.stdout.decode().strip().partition(";")[0]
    print("\n".join(filter(None, [told, f"job {job}; watch it with: megagpt slurm status{_shown_run_dir(argv)}"])))
    return 0


def _shown_run_dir(argv: Sequence[str]) -> str:
    folder = _value_of(argv, "run_dir")
    return "" if folder is None else f" {shlex.quote(folder)}"


def _status(argv: Sequence[str]) -> None:
    for line in lines(parse_flags(StatusSettings, argv, prog="megagpt slurm status").run_dir):
        print(line)
