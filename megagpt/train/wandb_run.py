"""Weights & Biases, through DeepSpeed's monitor: one run there for one run folder, and one x for all curves."""

import contextlib
import os
import secrets
from collections.abc import MutableMapping
from pathlib import Path

from megagpt.data.storage import replace

_ID, _LONGEST = "wandb_run_id", 64  # a file in the run folder; characters that the service takes


_told: dict[str, str] = {}  # variables that this process has set: the next of several runs sets them anew


def announce(run_dir: Path, ds_config: dict, *, resumed: bool, env: MutableMapping[str, str] = os.environ) -> None:
    """Tell the library, before the engine starts it, which of its runs this is; what the user has set wins.

    Without an id every start of a run would be another run of the service. Called on rank 0 alone.
    """
    if not ds_config.get("wandb", {}).get("enabled"):
        return
    wanted = {
        "WANDB_RUN_ID": (_earlier_id(run_dir) if resumed else "") or secrets.token_hex(8),
        "WANDB_RESUME": "allow",
        "WANDB_NAME": run_dir.name,
        "WANDB_DIR": str(run_dir),
    }
    for name, value in wanted.items():
        if name not in env or env[name] == _told.get(name):
            env[name] = _told[name] = value
    with contextlib.suppress(OSError):  # no run fails for want of it
        run_dir.mkdir(parents=True, exist_ok=True)
        replace(run_dir / _ID, f"{env['WANDB_RUN_ID']}\n")


def _earlier_id(run_dir: Path) -> str:
    """The id that the start before this one had; empty where there is none that can be one."""
    try:
        found = (run_dir / _ID).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return found if found.isprintable() and len(found) <= _LONGEST else ""


class WandbAtSteps:
    """Sends whole records at their step.

    The library ignores what comes at an x below the last one's, and the classic tags have consumed samples for x:
    beside them all curves over steps would be lost. Samples are a curve of their own, and any may be the axis.
    """

    def __init__(self, monitor) -> None:
        self._monitor = monitor

    def write_events(self, scalars: list[tuple], step: int) -> None:
        """One call of the library for ``scalars`` [(tag, value, x), ...] of ``step``."""
        self._monitor.log({tag: value for tag, value, _ in scalars}, step=step)

    def finish(self) -> None:
        """The run has come to its end: another one may begin in this process."""
        import wandb

        wandb.finish()


def take(monitor) -> WandbAtSteps | None:
    """Weights & Biases out of DeepSpeed's ``monitor``, which then serves the others; None where it is not on."""
    found = getattr(monitor, "wandb_monitor", None)
    if found is None:
        return None
    monitor.wandb_monitor = None
    return WandbAtSteps(found)
