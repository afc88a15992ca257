"""What the queue and the run folders tell about jobs."""

import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from megagpt.errors import ConfigError

# Number, name of the number (12_3 in an array), state, time left, nodes or reason, name.
_FORMAT = "%A|%i|%T|%L|%R|%j"


def lines(run_dirs: Sequence[str]) -> Iterator[str]:
    """A line for each of the user's jobs, or, given folders of runs, how far each run is and its jobs."""
    if not run_dirs:
        yield from _queue([]).values() or ["no jobs in the queue"]
        return
    for name in run_dirs:
        folder = Path(name)
        if not folder.is_dir():
            raise ConfigError(f"{name} is no folder of a run; give a --run_dir")
        yield f"{name}: {_progress(folder)}"
        jobs = sorted((path.name for path in folder.glob("slurm/*") if path.name.isdigit()), key=int)
        queued = _queue(jobs) if jobs else {}
        yield from (f"  {queued.get(job, f'{job} has ended{_code(folder, job)}')}" for job in jobs)


def _code(folder: Path, job: str) -> str:
    """The exit code that the job's last start left, unless it was 0."""
    try:
        return f" with code {(folder / 'slurm' / job / 'code').read_text(encoding='ascii').strip()[:4]}"
    except (OSError, UnicodeDecodeError):
        return ""


def _progress(folder: Path) -> str:
    """The last step and loss, the number of starts."""
    try:
        with open(folder / "run.json", encoding="utf-8") as file:
            run = json.load(file)
        steps, starts = run["schedule"]["total"], len(run["starts"])
    except (OSError, ValueError, KeyError, TypeError):
        return "nothing trained yet"
    step = loss = None
    for record in reversed(_last_records(folder / "metrics.jsonl")):
        step = step if step is not None else record.get("step")
        if "loss" in record:
            loss = record["loss"]
            break
    told = [f"step {step or 0:,} of {steps:,}", f"{starts} start{'s' * (starts != 1)}"]
    return ", ".join(told[:1] + ([f"loss {loss:.4f}"] if isinstance(loss, int | float) else []) + told[1:])


def _last_records(path: Path) -> list[dict]:
    """The records in the last 64 kB of a log; a line that is still being written is left out."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _queue(jobs: Sequence[str]) -> dict[str, str]:
    """A line by number for each of ``jobs`` that is in the queue, or for each of the user's."""
    program = shutil.which("squeue")
    if program is None:
        raise ConfigError("squeue is not on the PATH; ask on a login node of the cluster")
    which = ["--jobs", ",".join(jobs)] if jobs else ["--me"]
    done = subprocess.run([program, "--noheader", *which, "--format", _FORMAT], capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:  # long gone
        raise ConfigError(f"squeue fails: {' '.join(done.stderr.split())[-300:]}")
    rows = [line.split("|", 5) for line in done.stdout.splitlines() if line.count("|") >= 5]
    return {
        number: f"{shown} {state}, {left} left, {where}, {name}" for number, shown, state, left, where, name in rows
    }
