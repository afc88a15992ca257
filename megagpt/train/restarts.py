"""The starts of a run, in restarts.json: when each began and from which step, how far it came, and what that cost.

How a start ended is found out by the next one, for a process that is killed writes nothing: metrics.jsonl has its last
step, and the time at which it was written.
"""

import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from megagpt.data.storage import replace
from megagpt.errors import ConfigError, StorageError
from megagpt.train import metrics

NAME = "restarts.json"
_LIMIT = 3  # starts from one and the same step after which a job that is requeued by itself gives up


def read(run_dir: Path) -> list[dict]:
    """The starts so far; none where there is no file that can be read."""
    try:
        found = json.loads((run_dir / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(start, dict) for start in found) else []


def begin(run_dir: Path, step: int, limit: int | None, env: Mapping[str, str] = os.environ) -> None:
    """Note a start from ``step``, before metrics.jsonl is cut back to it; rank 0 calls this.

    Raises ConfigError where the last ``limit`` starts began at this very step: nothing is saved any more, and a job
    that requeues itself would go on like that for ever. Without a limit three are allowed to a requeued job, and any
    number to a person. 0 allows any.
    """
    requeued = env.get("SLURM_RESTART_COUNT", "0") != "0"
    starts = read(run_dir) if step or requeued or limit else []
    if limit is None:
        limit = _LIMIT if requeued else 0
    if limit and len(starts) >= limit and all(start.get("step") == step for start in starts[-limit:]):
        raise ConfigError(
            f"the last {limit} starts of {run_dir} all began at step {step} and none has saved a checkpoint since; "
            f"look at how they ended, and remove {run_dir / NAME} to go on"
        )
    if starts:
        _close(starts[-1], run_dir)
    now = {"step": step, "began": time.time(), "host": os.uname().nodename, "job": env.get("SLURM_JOB_ID")}
    try:
        replace(run_dir / NAME, json.dumps([*starts, now], indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write {run_dir / NAME}: {error.strerror}; choose another --run_dir") from None


def _close(start: dict, run_dir: Path) -> None:
    """Add to the last start how far it came and when it was last heard of."""
    path = run_dir / metrics.NAME
    reached = max((record["step"] for record in metrics.read(path)), default=start["step"])
    heard = path.stat().st_mtime if path.exists() else start["began"]
    start["reached"], start["ended"] = max(reached, start["step"]), max(heard, start["began"])


def figures(run_dir: Path, step_seconds: float, steps: int) -> dict:
    """What the restarts cost, at the end of a run of ``steps``.

    ``steps_lost`` were computed twice; ``downtime_seconds`` lie between the last word of one start and the beginning of
    the next; ``goodput`` is the part of the time since the first start that went into steps that count, of which there
    are ``step_seconds``. A start that found all steps done is none: the run had ended before.
    """
    starts = read(run_dir)
    if not starts:
        return {}
    while len(starts) > 1 and steps and starts[-1]["step"] == steps:
        starts.pop()
    pairs = list(itertools.pairwise(starts))
    wall = max(starts[-1].get("ended", time.time()) - starts[0]["began"], 1e-9)
    return {
        "starts": len(starts),
        "steps_lost": sum(max(0, a.get("reached", b["step"]) - b["step"]) for a, b in pairs),
        "downtime_seconds": sum(max(0.0, b["began"] - a.get("ended", b["began"])) for a, b in pairs),
        "goodput": min(1.0, step_seconds / wall),
    }
