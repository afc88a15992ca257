"""``megagpt finetune report|glue|warm``: what came out of fine-tuning runs, and what comes before one on a node."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError, StorageError, nearest
from megagpt.finetune import glue, report, report_plots


@dataclass(frozen=True)
class ReportSettings:
    """Compare fine-tuning runs: megagpt finetune report runs/*"""

    run: Positional[tuple[str, ...]] = ()
    """run folders, or folders of run folders"""
    output: str = "finetune_report"
    """where to write: this name with .md, .csv and .png"""


@dataclass(frozen=True)
class GlueSettings:
    """Pack the predictions of runs on GLUE's tasks: megagpt finetune glue runs/* --output glue.zip"""

    run: Positional[tuple[str, ...]] = ()
    """run folders, or folders of run folders"""
    output: str = "glue.zip"
    """the submission's file"""
    fill: bool = False
    """give a constant answer to tasks without a run"""


def finetune_main(argv: list[str]) -> int:
    """Run ``megagpt finetune``; its exit code, 0."""
    commands = {"report": _report, "glue": _glue, "warm": _warm}
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print(
            "usage: megagpt finetune report RUN... [--output NAME]   compare runs: Markdown, CSV, PNG\n"
            "       megagpt finetune glue RUN... [--output ZIP]      pack a submission to the GLUE benchmark\n"
            "       megagpt finetune warm FLAGS OF finetune.py       compile what a run needs, before its ranks start\n"
            "To fine-tune: deepspeed finetune.py --help"
        )
        return 0
    if command not in commands:
        raise ConfigError(
            f"unknown command {command[:80]!r}{nearest(command[:80], commands)}; choose {', '.join(commands)}"
        )
    commands[command](argv[1:])
    return 0


def _report(argv: list[str]) -> None:
    settings = parse_flags(ReportSettings, argv, prog="megagpt finetune report")
    lines = report.lines_of(_runs(settings.run))
    text = report.to_markdown(lines)
    print(text, end="")
    base = settings.output
    try:
        Path(base).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{base}.md").write_text(text, encoding="utf-8")
        Path(f"{base}.csv").write_text(report.to_csv(lines), encoding="utf-8")
        problem = report_plots.missing()
        if problem is None:
            report_plots.plot_report(lines, Path(f"{base}.png"))
    except OSError as error:
        raise StorageError(f"cannot write {base}.*: {error.strerror}; choose another --output") from None
    print(f"written: {base}.md, {base}.csv" + (f", {base}.png" if problem is None else f"; no picture: {problem}"))


def _glue(argv: list[str]) -> None:
    settings = parse_flags(GlueSettings, argv, prog="megagpt finetune glue")
    try:
        notes = glue.write_submission(_runs(settings.run), Path(settings.output), fill=settings.fill)
    except OSError as error:
        raise StorageError(f"cannot write {settings.output}: {error.strerror}; choose another --output") from None
    for note in notes:
        print(f"note: {note}")
    print(f"written: {settings.output}")


def _warm(argv: list[str]) -> None:
    from megagpt.finetune.warm import warm_main  # torch takes seconds to load

    warm_main(argv)


def _runs(folders: tuple[str, ...]) -> list[report.Run]:
    if not folders:
        raise ConfigError("name the run folders, as in runs/*")
    return report.find_runs(folders)
