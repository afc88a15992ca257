"""What is left to read when a run stops because its numbers are no longer finite."""

import contextlib
import json
from collections import deque
from pathlib import Path

import torch
from torch import nn

from megagpt import dist
from megagpt.train.manifest import write_atomically

NAME = "numeric_stop.json"


class LastSteps:
    """The last updates of this rank. Nothing is read from the device before it is asked for."""

    def __init__(self, n: int = 20) -> None:
        self._steps: deque[dict] = deque(maxlen=n)

    def add(self, step: int, loss: torch.Tensor, grad_norm, skipped: bool, first_sample: int, samples: int) -> None:
        """Note an update on the samples from ``first_sample`` on, with this rank's mean ``loss``."""
        self._steps.append(
            {
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "skipped": skipped,
                "samples": [first_sample, first_sample + samples - 1],
            }
        )

    def describe(self) -> list[dict]:
        """The updates as JSON can hold them: what is not finite as text."""
        return [{key: _plain(value) for key, value in step.items()} for step in self._steps]


def write(run_dir: Path, last: LastSteps, model: nn.Module, reason: str) -> Path:
    """Write numeric_stop.json: ``reason``, every rank's last updates, and which parameters are not finite.

    Every rank calls this. A file that cannot be written is left out: the run ends for another reason.
    """
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p.detach()).all())]
    ranks = dist.gather_json({"last_steps": last.describe(), "parameters_not_finite": broken[:20]})
    path = run_dir / NAME
    if dist.is_main():
        with contextlib.suppress(OSError):
            write_atomically(path, json.dumps({"reason": reason, "ranks": ranks}, indent=1) + "\n")
    return path


def _plain(value):
    if isinstance(value, bool | int | list) or value is None:
        return value
    number = float(value)
    return number if number - number == 0 else str(number)
