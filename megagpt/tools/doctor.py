"""``megagpt doctor``: what of this machine a run will use, what is wrong with it, and the way out. One screen.

Exit code 0: all is well. 1: something is slower or less than it could be. 2: something will not work.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from megagpt.config.flags import parse_flags
from megagpt.tools import doctor_host, doctor_packages
from megagpt.tools.doctor_finding import LEVELS, Finding
from megagpt.version import __version__


@dataclass(frozen=True)
class DoctorSettings:
    """Look at this machine: megagpt doctor; in a job, srun megagpt doctor"""

    run_dir: str = "runs"  # a folder on the disk that the runs are to write to
    model: str = "gpt1"  # the preset whose checkpoints have to fit there, and whose heads the kernels have to serve
    json: bool = False  # everything as one JSON object
    remove_locks: bool = False  # remove the locks of builds that no process holds any more


def doctor_main(argv: Sequence[str] | None = None) -> int:
    """Run ``megagpt doctor``; exit code 0, 1 with warnings, 2 with errors."""
    settings = parse_flags(DoctorSettings, argv, prog="megagpt doctor")
    findings = list(examine(settings))
    if settings.json:
        print(json.dumps({"version": __version__, "code": exit_code(findings), "findings": [*map(asdict, findings)]}))
    else:
        print("\n".join(lines(findings)))
    return exit_code(findings)


def examine(settings: DoctorSettings) -> Iterator[Finding]:
    """Every check, in the order of the screen."""
    yield from doctor_packages.examine(settings.model)
    yield from doctor_host.examine(settings.run_dir, settings.model, remove_locks=settings.remove_locks)


def exit_code(findings: Sequence[Finding]) -> int:
    """The place of the worst level among the findings in LEVELS."""
    return max(LEVELS.index(finding.level) for finding in findings)


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The screen: a line a finding, what it means and the way out below those that are not well, and a sum."""
    colours = {"ok": "", "warning": "\033[33m", "error": "\033[31m"} if sys.stdout.isatty() else {}
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        colour = colours.get(finding.level, "")
        mark = {"ok": " ok ", "warning": "warn", "error": "FAIL"}[finding.level]
        yield f"{colour}{mark}{colour and chr(27) + '[0m'}  {finding.name:<{width}}  {finding.found}"
        if finding.meaning:
            yield f"{'':{width + 8}}{finding.meaning}"
        if finding.way_out:
            yield f"{'':{width + 8}}-> {finding.way_out}"
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS[1:]}
    told = [f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items() if n]
    yield f"\n{' and '.join(told) or 'nothing is wrong'}; docs/troubleshooting.md explains the messages of runs"
