"""What is left to read of an update whose numbers are not finite: numeric_stop.json."""

import contextlib
import json
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from megagpt import dist
from megagpt.data import storage
from megagpt.secrets import hide, without_secrets
from megagpt.train import manifest

NAME = "numeric_stop.json"


class Evidence:
    """The last updates of this rank, and the micro-batches of the very last; nothing is read from the device before

    :meth:`write`. ``forward(model, batch)`` is a micro-batch's loss.
    """

    def __init__(self, root: Path, model: nn.Module, forward: Callable, n: int = 20) -> None:
        self._root, self._run_dir = root, root.parent
        self._model, self._forward = model, forward
        self._steps: deque[dict] = deque(maxlen=n)
        self._batches: list = []

    def begin(self) -> None:
        """A new update begins."""
        self._batches = []

    def add_batch(self, batch):
        self._batches.append(batch)
        return batch

    def add(self, step: int, loss: torch.Tensor, grad_norm, skipped: bool, samples: list[list[int]]) -> None:
        """Note the update on ``samples``, ranges [first, end), with this rank's mean ``loss``."""
        inclusive = [[first, end - 1] for first, end in samples]
        self._steps.append(
            {
                "step": step,
                "loss": loss,
                "grad_norm": grad_norm,
                "skipped": skipped,
                "samples": inclusive[0] if len(inclusive) == 1 else inclusive,
            }
        )

    def write(self, reason: str) -> Path:
        """Write ``reason``, every rank's last updates, what is not finite, and a command to see it again; the file.

        The forward pass of the last update is repeated. Every rank calls this. A file that cannot be written is left
        out: the run ends, or goes back, for another reason.
        """
        broken = [name for name, p in self._model.named_parameters() if not bool(torch.isfinite(p.detach()).all())]
        found = {
            "last_steps": [{key: _plain(value) for key, value in step.items()} for step in self._steps],
            "first_not_finite": first_not_finite(self._model, self._forward, self._batches),
            "parameters_not_finite": broken[:20],
        }
        ranks = dist.gather_json(found)
        path = self._run_dir / NAME
        if dist.is_main():
            saved = next(iter(manifest.folders(self._root)), None)
            told = {"reason": reason, "replay": replay_command(self._run_dir, saved, len(ranks)), "ranks": ranks}
            with contextlib.suppress(OSError):
                storage.replace(path, hide(json.dumps(told, indent=1)) + "\n")
        return path


@torch.no_grad()
def first_not_finite(model: nn.Module, forward: Callable, batches: Iterable) -> str | None:
    """The first module whose output is not finite in a forward pass over ``batches``, None where all are.

    Dropout draws other units than in the update, and the generators go on as if nothing had been.
    """
    first: list[str] = []

    def look(name: str):
        def hook(module, inputs, output) -> None:
            tensors = output if isinstance(output, tuple | list) else (output,)
            floats = [t for t in tensors if torch.is_tensor(t) and t.is_floating_point()]
            if not first and not all(bool(torch.isfinite(t).all()) for t in floats):
                first.append(f"the output of {name}" if name else "the loss")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            for batch in batches:
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return first[0] if first else None


def replay_command(run_dir: Path, checkpoint: Path | None, ranks: int, argv: list[str] = sys.argv) -> str:
    """The command that repeats the last steps, from ``checkpoint`` on or from the start, in a folder of its own."""
    resume = "never" if checkpoint is None else checkpoint
    changed = {"run_dir": f"{run_dir}-replay", "on_nan": "stop", "resume": resume}
    words = [argv[0], *_without(argv[1:], {*changed, "mirror", "local_rank"})]
    words += [word for name, value in changed.items() for word in (f"--{name}", str(value))]
    return shlex.join(["megagpt", "launch", "--num_gpus", str(ranks), *without_secrets(words)])


def _without(argv: list[str], names: set[str]) -> list[str]:
    """Flags and their values but those of ``names``."""
    kept, dropping = [], False
    for word in argv:
        if word.startswith("--"):
            dropping = word[2:].split("=")[0].replace("-", "_") in names
        if not dropping:
            kept.append(word)
    return kept


def _plain(value):
    if isinstance(value, bool | int | list) or value is None:
        return value
    number = float(value)
    return number if number - number == 0 else str(number)
