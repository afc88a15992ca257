"""Cutting the files of DeepSpeed's csv_monitor back to the checkpoint that a run resumes from.

There is a file for each tag, with lines "x,value" below one line of names. DeepSpeed appends, with the names once more
at each start, so that a resumed run would have them, and the steps it repeats, twice.
"""

from pathlib import Path

from megagpt.data.storage import replace

_SAMPLES = "Train_Samples_"  # of the classic tags, whose x is samples and not steps
_STEPS = "train_loss.csv"  # a line for each record, as the classic ones have
_END = "\r\n"  # as Python's csv module writes


def truncate(folder: Path, last_step: int) -> list[str]:
    """Keep the lines up to ``last_step`` in every file of ``folder``; the names of those whose first line stays.

    Raises OSError.
    """
    files = {path.name: _lines(path) for path in sorted(folder.glob("*.csv"))}
    files = {name: (names, lines) for name, (names, lines) in files.items() if names}
    n_records = sum(_x(line) <= last_step for line in files.get(_STEPS, ("", []))[1])
    for name, (names, lines) in files.items():
        classic = name.startswith(_SAMPLES)
        kept = lines[:n_records] if classic else [line for line in lines if _x(line) <= last_step]
        replace(folder / name, "".join(f"{line}{_END}" for line in (names, *kept)))
    return [Path(name).stem for name in files]


def _lines(path: Path) -> tuple[str, list[str]]:
    """The line of names, and the lines of numbers; one that a kill has torn is none."""
    names, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    return names, [line for line in lines if line.partition(",")[0].isdecimal() and line.partition(",")[2]]


def _x(line: str) -> int:
    return int(line.partition(",")[0])
