"""What a run leaves to read: run.json at its start; summary.json, summary.md and loss.png at its end."""

import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from megagpt.data.storage import replace
from megagpt.errors import StorageError
from megagpt.secrets import hide, without_secrets
from megagpt.train import metrics, restarts
from megagpt.train.plots import plot_losses
from megagpt.version import __version__

RUN = "run.json"
SUMMARY = "summary.json"
TOKENIZER = "tokenizer.json"
_LANGUAGE_MODEL = ("loss", "ppl", "word_ppl", "bits_per_byte")
_PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "triton")


def write_run(
    run_dir: Path, description: dict, *, start_step: int, world_size: int, tokenizer: Path | None = None
) -> None:
    """Write run.json: ``description`` (settings, model, data, ds_config, ...), this machine, and every start so far.

    A copy of the ``tokenizer`` makes the run folder enough to generate from. Raises StorageError when it cannot be
    written.
    """
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": start_step,
        "world_size": world_size,
        "host": socket.gethostname(),
        "command": sys.argv,
        "git_commit": git_commit(),
    }
    earlier = read_run(run_dir).get("starts")
    starts = [*earlier, start] if start_step and isinstance(earlier, list) else [start]
    body = {**description, "versions": versions(), "device": device_names(), "starts": starts}
    plain = json.loads(json.dumps(body, default=str))
    _write(run_dir / RUN, hide(json.dumps(without_secrets(plain), indent=1)) + "\n")
    if tokenizer is not None and tokenizer.exists():
        _write(run_dir / TOKENIZER, tokenizer.read_text(encoding="utf-8"))


def read_run(run_dir: Path) -> dict:
    """What is in run.json, or nothing where there is none that can be read: no run fails for want of it."""
    try:
        found = json.loads((run_dir / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """The versions of Python and of what training computes with."""
    found = {"megagpt": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_names() -> dict:
    """The devices this process sees and the CUDA version that torch was built for."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu_cores": os.cpu_count(), "gpus": names, "cuda": torch.version.cuda}


def git_commit() -> str | None:
    """The commit of the working directory, with ``+changes`` where files differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def write_summary(run_dir: Path, summary: dict) -> dict:
    """Write summary.json, summary.md and loss.png from ``summary`` and the run's metrics; the whole summary.

    Raises StorageError when the run folder cannot be written.
    """
    records = metrics.read(run_dir / metrics.NAME)
    picture, problem = plot_losses(records, run_dir / "loss.png")
    found = summarize(records)
    cost = restarts.figures(run_dir, found.get("all_starts_step_seconds", 0.0), found["steps"])
    whole = {**summary, **found, **cost, "loss_curve": picture or f"not drawn: {problem}"}
    _write(run_dir / SUMMARY, json.dumps(whole, indent=1, default=str) + "\n")
    _write(run_dir / "summary.md", to_markdown(run_dir.name, whole, picture))
    return whole


def summarize(records: list[dict]) -> dict:
    """Last training figures, median speed, and for each validation set its first, last and best evaluation."""
    train = [r for r in records if "loss" in r]
    if not train:
        return {"steps": 0, "valid": {}}
    last = train[-1]
    return {
        "steps": last["step"],
        "samples": last["samples"],
        "tokens": last["tokens"],
        "train_loss": last["loss"],
        "skipped_steps": last["skipped_steps"],
        "all_starts_step_seconds": _step_seconds(train),
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in train),
        "step_ms": statistics.median(r["step_ms"] for r in train),
        "memory_gb": max(r["memory_gb"] for r in train),
        **({"mfu": statistics.median(r["mfu"] for r in train if "mfu" in r)} if "mfu" in last else {}),
        "valid": {name: _evaluations(records, name) for name in validation_sets(records)},
    }


def _step_seconds(train: list[dict]) -> float:
    """The time spent in steps over all starts of the run, without evaluations and saves."""
    steps = [r["step"] for r in train]
    taken = [after - before for before, after in zip([0, *steps], steps, strict=False)]
    return sum(n * r["step_ms"] for n, r in zip(taken, train, strict=True)) / 1e3


def validation_sets(records: list[dict]) -> list[str]:
    """The names of the validation sets in the order in which they first appear."""
    names = (key.split("/", 1)[1].rsplit("/", 1)[0] for r in records for key in r if key.startswith("valid/"))
    return list(dict.fromkeys(names))


def _evaluations(records: list[dict], name: str) -> dict:
    prefix = f"valid/{name}/"
    found = [
        {"step": r["step"], **{key.removeprefix(prefix): r[key] for key in r if key.startswith(prefix)}}
        for r in records
        if r.get(f"{prefix}loss") is not None
    ]
    if not found:
        return {}
    return {"first": found[0], "last": found[-1], "best": min(found, key=lambda e: e["loss"])}


def outcome(run_dir: Path, summary: dict) -> list[str]:
    """What a run came to, in a line for each validation set and one that says where to read on."""
    lines = []
    for name, evaluations in summary["valid"].items():
        first, last = evaluations.get("first", {}), evaluations.get("last", {})
        measures = [
            f"{label} {first[key]:.4f} at step {first['step']}, {last[key]:.4f} at step {last['step']}"
            for key, label in (("loss", "loss"), ("bits_per_byte", "bits per byte"))
            if first.get(key) is not None and last.get(key) is not None
        ]
        lines += [f"valid/{name}: {'; '.join(measures)}"] if measures else []
    return [*lines, f"finished: {run_dir / 'summary.md'}"]


def to_markdown(title: str, summary: dict, picture: str | None) -> str:
    """The summary for people: a task's metrics, the run's settings and speed, its evaluations, the loss curve."""
    lines = [f"# {title}", "", *_result_table(summary), "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in summary.items() if not isinstance(value, dict | list)]
    lines += _evaluation_table(summary.get("valid", {}))
    if picture:
        lines += ["", f"![loss curve]({picture})"]
    return "\n".join(lines) + "\n"


def _result_table(summary: dict) -> list[str]:
    """The metrics of a fine-tuned model's splits, each above those of a constant answer; nothing for other runs."""
    splits = {split: found for split, found in summary.get("metrics", {}).items() if found}
    if not splits:
        return []
    names = list(dict.fromkeys(name for found in splits.values() for name in found))
    lines = [f"Best weights: step {_cell(summary.get('best_step'))}, epoch {_cell(summary.get('best_epoch'))}.", ""]
    lines += ["| split | examples | " + " | ".join(names) + " |", "|---|---:|" + "---:|" * len(names)]
    for split, found in splits.items():
        n = summary.get("examples", {}).get(split)
        rows = [(split, n, found), ("constant answer", None, summary.get("constant", {}).get(split, {}))]
        for name, size, values in rows:
            cells = " | ".join(_cell(values.get(measure)) for measure in names)
            lines.append(f"| {name} | {'' if size is None else _cell(size)} | {cells} |")
    return [*lines, ""]


def _evaluation_table(valid: dict[str, dict]) -> list[str]:
    """First, last and best evaluation of every validation set, with the measures that it has."""
    if not valid:
        return []
    found = {name: None for evaluations in valid.values() for e in evaluations.values() for name in e if name != "step"}
    measures = _LANGUAGE_MODEL if "ppl" in found or not found else tuple(found)
    lines = ["", "| validation set | step | " + " | ".join(measures) + " |", "|---|---|" + "---|" * len(measures)]
    for name, evaluations in valid.items():
        for when, e in evaluations.items():
            cells = " | ".join(_cell(e.get(m)) for m in measures)
            lines.append(f"| {name} ({'lowest loss' if when == 'best' else when}) | {e['step']} | {cells} |")
    return lines


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 100 <= abs(value) < 1e12 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, text)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; free space or choose another --run_dir") from None
