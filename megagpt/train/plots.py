"""The loss curve of a run as a picture."""

import importlib.util
from pathlib import Path

import numpy as np

_REACH = 40  # the bold line is a mean over a 40th of the run, at least two points, to either side


def plot_losses(records: list[dict], path: Path) -> tuple[str | None, str | None]:
    """Draw training and validation loss over tokens to ``path``; its name, or None and the reason why not."""
    train = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
    valid = _validation(records) if train else {}
    if max([len(train), *(len(x) for x, _ in valid.values())]) < 2:
        return None, "fewer than two logged steps"
    if importlib.util.find_spec("matplotlib") is None:
        return None, "matplotlib is not installed (pip install 'megagpt[plots]')"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    tokens, losses = np.array(train).T
    axes.plot(tokens, losses, color="0.8", linewidth=0.8)
    axes.plot(tokens, _smooth(losses), color="0.4", linewidth=1.6, label="training (running mean)")
    for name, (x, y) in valid.items():
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.2, label=f"validation: {name}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_formatter(_tokens_label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path)
    except OSError as error:
        return None, f"{path} cannot be written ({error.strerror})"
    return path.name, None


def _validation(records: list[dict]) -> dict[str, tuple[list[int], list[float]]]:
    """For each validation set its losses and the tokens consumed when they were taken."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    tokens_of = {r["step"]: r["tokens"] for r in records if "tokens" in r}
    for r in records:
        for key, value in r.items():
            if key.startswith("valid/") and key.endswith("/loss") and value is not None:
                x, y = curves.setdefault(key.removeprefix("valid/").removesuffix("/loss"), ([], []))
                x.append(tokens_of.get(r["step"], _interpolated(tokens_of, r["step"])))
                y.append(value)
    return curves


def _interpolated(tokens_of: dict[int, int], step: int) -> float:
    """Tokens grow evenly with steps, so a step that was not logged is read off the last that was."""
    last = max(tokens_of)
    return tokens_of[last] * step / last


def _smooth(losses: np.ndarray) -> np.ndarray:
    """The mean over a centred window, narrower towards both ends: the line neither lags nor starts late."""
    n = len(losses)
    position = np.arange(n)
    reach = np.minimum(max(2, n // _REACH), np.minimum(position, n - 1 - position))
    sums = np.concatenate([[0.0], np.cumsum(losses, dtype=np.float64)])
    return (sums[position + reach + 1] - sums[position - reach]) / (2 * reach + 1)


def _tokens_label(value: float, _position=None) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"
