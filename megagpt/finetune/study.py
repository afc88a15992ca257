"""megagpt study layers|size|ablation: what transfer brings, as a sweep of fine-tuning runs.

layers    how many of the pre-trained blocks are taken over, from the embeddings alone to all of them
size      how many training examples there are: with and without the auxiliary language model, and from scratch
ablation  the full method, without the auxiliary language model, without pre-training, and with an LSTM

Every run is a command that one could type. A study that is started again makes only the runs that are missing.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError, DataError, nearest
from megagpt.finetune import report, report_plots
from megagpt.finetune.several import tasks_of
from megagpt.tools.slurm_script import render

STUDIES = ("layers", "size", "ablation")
SIZES = "100,250,500,1000,2000,all"
_LABELS = {"layers": "pre-trained blocks taken over", "size": "training examples", "ablation": "method"}
_OWN = ("seed", "seeds", "run_dir", "n_transfer", "limit_train")  # the study's business, not the user's


@dataclass(frozen=True)
class StudySettings:
    """Sweep fine-tuning: megagpt study layers --run_dir runs/study -- --ds_config FILE --task NAME --init_from RUN"""

    run_dir: str  # folder of the runs and of the study's results
    seeds: str = "1,2,3"  # a run for each, at every point
    values: str | None = None  # layers: numbers of blocks (all by default); size: numbers of examples, or all
    lstm_from: str | None = None  # ablation: a pre-trained LSTM's run folder
    launcher: str = "deepspeed"  # what starts finetune.py; with --slurm srun does
    slurm: bool = False  # make no run, but write the script of a Slurm array that makes them


@dataclass(frozen=True)
class Point:
    """One run of a study."""

    curve: str
    x: float | str
    seed: int
    folder: Path
    command: tuple[str, ...]
    flags: tuple[str, ...]  # those of the command that are this run's own


def study_main(argv: Sequence[str]) -> int:
    """Run ``megagpt study``; the exit code of the first run that fails, else 0."""
    kind, *rest = list(argv) or ["--help"]
    own, passed = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    if kind in ("-h", "--help"):
        print(__doc__)
        parse_flags(StudySettings, ["--help"], prog="megagpt study layers|size|ablation")
    if kind not in STUDIES:
        raise ConfigError(f"study {kind[:80]!r} is unknown{nearest(kind[:80], STUDIES)}; choose {', '.join(STUDIES)}")
    settings = parse_flags(StudySettings, own, prog=f"megagpt study {kind}")
    points = points_of(kind, settings, passed)
    missing = [point for point in points if not (point.folder / "summary.json").exists()]
    if missing and settings.slurm:
        script = write_array(Path(settings.run_dir), missing, passed)
        print(f"{len(missing)} runs are missing; start them with: sbatch {script}")
        return 0
    for i, point in enumerate(missing, 1):
        print(f"\n[{i}/{len(missing)}] $ {shlex.join(point.command)}", flush=True)
        if code := _run(point.command):
            print(f"stopped: exit code {code}; the same command goes on with the runs that are missing", flush=True)
            return code
    print(collect(kind, points, Path(settings.run_dir)))
    return 0


def points_of(kind: str, settings: StudySettings, passed: Sequence[str]) -> list[Point]:
    """The runs of a study. ``passed`` are the flags of finetune.py that all of them share. Raises ConfigError."""
    flags = _flag_values(passed)
    own = [f"--{name}" for name in _OWN if name in flags]
    if own:
        raise ConfigError(f"{' and '.join(own)} after -- is what the study varies; give --seeds, --values, --run_dir")
    if "init_from" not in flags:
        raise ConfigError("a study of transfer needs --init_from RUN after --")
    if len(tasks_of(flags.get("task"))) > 1:
        raise ConfigError(f"--task {flags['task']} names several tasks and a study is of one; make one for each")
    try:
        seeds = [int(seed) for seed in settings.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {settings.seeds!r} is not a list of whole numbers, as in 1,2,3") from None
    points = []
    for curve, x, extra in {"layers": _layers, "size": _size, "ablation": _ablation}[kind](settings, flags):
        for seed in seeds:
            name = f"{curve} {x} {seed}" if kind == "size" else f"{x} {seed}"
            folder = Path(settings.run_dir) / name.replace(" ", "-").lower()
            own = (*extra, "--seed", str(seed), "--run_dir", str(folder))
            shared = _without(passed, [word[2:] for word in extra if word.startswith("--")])
            command = (*shlex.split(settings.launcher), "finetune.py", *shared, *own)
            points.append(Point(curve, x, seed, folder, command, own))
    return points


def _layers(settings: StudySettings, flags: dict):
    values = _numbers(settings.values) if settings.values else range(n_layers(flags["init_from"]) + 1)
    for k in values:
        yield "transfer", k, ["--n_transfer", str(k)]


def _size(settings: StudySettings, flags: dict):
    for value in (settings.values or SIZES).split(","):
        x = value.strip() if value.strip() == "all" else _numbers(value)[0]
        limit = [] if x == "all" else ["--limit_train", str(x)]
        yield "with auxiliary LM", x, limit
        yield "no auxiliary LM", x, [*limit, "--lm_coef", "0"]
        yield "from scratch", x, [*limit, "--from_scratch"]


def _ablation(settings: StudySettings, flags: dict):
    yield "ablation", "full", []
    yield "ablation", "no auxiliary LM", ["--lm_coef", "0"]
    yield "ablation", "from scratch", ["--from_scratch"]
    if settings.lstm_from:
        yield "ablation", "LSTM", ["--init_from", settings.lstm_from]


def n_layers(run: str) -> int:
    """The number of blocks of a run's model, from its run.json. Raises ConfigError where it does not say."""
    try:
        described = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))
        return int(described["model"]["n_layer"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{run}/run.json does not tell the number of blocks; give --values, as in 0,1,2") from None


def _numbers(words: str) -> list[int]:
    try:
        return [int(word) for word in words.split(",")]
    except ValueError:
        raise ConfigError(f"--values {words!r} is not a list of whole numbers, as in 0,1,2") from None


def _flag_values(args: Sequence[str]) -> dict[str, str]:
    """Flags with the word behind them, names with underscores."""
    found = {}
    for i, arg in enumerate(args):
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            found[name.replace("-", "_")] = value if equals else (args[i + 1] if i + 1 < len(args) else "")
    return found


def _without(args: Sequence[str], names: Sequence[str]) -> list[str]:
    """``args`` without the flags ``names`` and the values behind them."""
    kept, drop = [], False
    for arg in args:
        if arg.startswith("--"):
            name, equals, _ = arg[2:].partition("=")
            drop = name.replace("-", "_") in names
            if drop:
                drop = not equals
                continue
        if not drop:
            kept.append(arg)
        drop = False
    return kept


def _run(command: Sequence[str]) -> int:
    """The launchers that belong to this Python come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        return subprocess.run(command, env={**os.environ, "PATH": path}).returncode
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be started: {error.strerror}; give another --launcher") from None


def write_array(folder: Path, points: Sequence[Point], passed: Sequence[str]) -> Path:
    """Write slurm/array.sbatch for ``points``, a task each, and the file with every run's own flags; the script's path.

    ``passed`` are the flags that all share. Partition, account, GPUs and time come from the command line of sbatch or
    its environment. Raises ConfigError for a ``folder`` whose name cannot stand in a batch script.
    """
    options = {  # resources as in finetune.sbatch
        "job-name": "megagpt-study",
        "array": f"1-{len(points)}",
        "output": f"{folder}/%x-%A_%a.out",
        "ntasks-per-node": "1",
        "gpus-per-node": "1",
        "time": "04:00:00",
        "signal": "B:USR1@120",
    }
    sweep = folder / "sweep.txt"
    text = render("array", options, {"SCRIPT": "finetune.py", "SWEEP": str(sweep.absolute())}, passed)
    folder.mkdir(parents=True, exist_ok=True)
    sweep.write_text("".join(shlex.join(point.flags) + "\n" for point in points), encoding="utf-8")
    script = folder / "array.sbatch"
    script.write_text(text, encoding="utf-8")
    return script


def collect(kind: str, points: Sequence[Point], folder: Path) -> str:
    """Write study.csv, study.md and study.png from the finished runs; the table. Raises DataError for a missing one."""
    results = [(point, report.read_run(point.folder)) for point in points]
    lost = [str(point.folder) for point, run in results if run is None]
    if lost:
        raise DataError(f"{lost[0]} has no summary of a fine-tuning run; remove that folder and start again")
    split, metrics = next(iter(results[0][1].metrics.items()))
    metric = next(iter(metrics))
    curves: dict[str, dict] = {}
    for point, run in results:
        x = run.train_examples if point.x == "all" else point.x
        curves.setdefault(point.curve, {}).setdefault(x, []).append(report.shown(metric, run.metrics[split][metric]))
    rows = [(curve, x, values) for curve, found in curves.items() for x, values in found.items()]
    text = f"| | {_LABELS[kind]} | median {metric} | range | seeds |\n|---|---:|---:|---:|---:|\n"
    table = "curve,x,metric,median,values\n"
    for curve, x, values in rows:
        spread = f"{min(values):.2f}-{max(values):.2f}"
        text += f"| {curve} | {x} | {statistics.median(values):.2f} | {spread} | {len(values)} |\n"
        table += f"{curve},{x},{metric},{statistics.median(values):.4f},{' '.join(f'{v:.4f}' for v in values)}\n"
    (folder / "study.md").write_text(text, encoding="utf-8")
    (folder / "study.csv").write_text(table, encoding="utf-8")
    problem = report_plots.missing()
    if problem is None:
        label = f"{metric} on {split}, percent"
        report_plots.plot_curves(curves, folder / "study.png", x=_LABELS[kind], y=label)
    return text + f"\nwritten: {folder}/study.md, study.csv" + (", study.png" if problem is None else f"; {problem}")
