"""What the kernels are meant to reach on an H200, held against a report."""

from collections.abc import Iterator
from typing import NamedTuple

import timing

DEVICE = "NVIDIA H200"


class Goal(NamedTuple):
    """One thing to reach; ``found`` is None where it was not measured."""

    text: str
    wanted: float
    found: float | None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def goals(device: str, rows: list[dict], steps: list[dict]) -> list[Goal]:
    """Every goal, with what rows and steps of a report say; none on another device, for which they were not set."""
    if device != DEVICE:
        return []
    rows = [row for row in rows if row["status"] == "timed"]
    return [*_attention(rows), *_rows(rows), *_loss(rows), *_steps(steps)]


def _value(rows: list[dict], name: str, provider: str = "megagpt", **wanted) -> float | None:
    """The field ``name`` of the row that has what is wanted, in bf16 and without dropout unless told."""
    wanted = {"dtype": "bf16", "dropout": 0.0, "provider": provider} | wanted
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row[name]
    return None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def _attention(rows: list[dict]) -> Iterator[Goal]:
    wanted = {
        "gpt1": {"forward": 225, "both": 170},
        "gpt2-small": {"forward": 290, "both": 240},
        "1.3b, 32 heads": {"both": 290},
        "1.3b": {"forward": 400, "backward": 300},
    }
    for shape, passes in wanted.items():
        for which, tflops in passes.items():
            here = {"op": "attention", "shape": shape, "pass": which}
            yield Goal(f"attention, {shape}, {which}: TFLOP/s", tflops, _value(rows, "tflops", **here))
    for shape in ("gpt1", "gpt2-small", "1.3b, 32 heads"):
        here = {"op": "attention", "shape": shape, "pass": "both"}
        yield Goal(f"attention, {shape}: speed-up over the best peer", 1.0, _value(rows, "speedup", **here))
    for shape in wanted:
        here = {"op": "attention", "shape": shape, "pass": "both"}
        ms = _value(rows, "ms", **here)
        dropped = here | {"dropout": 0.1}
        yield Goal(f"attention, {shape}, dropout: speed-up over the best peer", 1.0, _value(rows, "speedup", **dropped))
        slower = _ratio(_value(rows, "ms", **dropped), ms)
        yield Goal(f"attention, {shape}, dropout: time of that without", 1.5, slower, at_most=True)
        here["pass"] = "backward"
        ordered = _value(rows, "ms", "megagpt, deterministic", **here)
        slower = _ratio(ordered, _value(rows, "ms", **here))
        yield Goal(f"attention, {shape}, deterministic backward: time of the default", 1.25, slower, at_most=True)


def _rows(rows: list[dict]) -> Iterator[Goal]:
    shares = {  # percent of the copy bandwidth, forward and backward; of LayerNorm also for narrow rows
        ("layer_norm", 0.0): (88, 75),
        ("add_layer_norm", 0.1): (85, 75),
        ("bias_gelu", 0.0): (92, 85),
    }
    for (op, dropout), passes in shares.items():
        shapes = dict.fromkeys(row["shape"] for row in rows if row["op"] == op) or ("every shape",)
        for shape in shapes:
            narrow = op == "layer_norm" and shape.startswith("gpt1")
            for which, percent in zip(("forward", "backward"), (80, 65) if narrow else passes, strict=True):
                here = {"op": op, "shape": shape, "pass": which, "dropout": dropout}
                found = _value(rows, "percent_of_floor", **here)
                yield Goal(f"{op}, {shape}, {which}: % of the copy bandwidth", percent, found)
    for peer in ("torch", "liger"):
        here = {"op": "layer_norm", "shape": "1.3b", "pass": "backward"}
        ratio = _ratio(_value(rows, "ms", peer, **here), _value(rows, "ms", **here))
        yield Goal(f"layer_norm, 1.3b, backward: times as fast as {peer}", 1.5, ratio)


def _loss(rows: list[dict]) -> Iterator[Goal]:
    here = {"op": "linear_cross_entropy", "shape": "gpt2-small", "pass": "both"}
    ms = _value(rows, "ms", **here)
    ratio = _ratio(ms, _value(rows, "ms", "liger, after the projection", **here))
    yield Goal("linear_cross_entropy: time of a projection and a fused loss", 1.1, ratio, at_most=True)
    ratio = _ratio(_value(rows, "ms", "liger", **here), ms)
    yield Goal("linear_cross_entropy: times as fast as liger", 2.0, ratio)
    yield Goal("linear_cross_entropy: MB beside its inputs", 512, _value(rows, "extra_mb", **here), at_most=True)


def _steps(steps: list[dict]) -> Iterator[Goal]:
    def value(name: str, model: str, dropout: float = 0.0, dtype: str = "bf16") -> float | None:
        return _value(
            [{**step, "provider": step["backend"]} for step in steps], name, model=model, dropout=dropout, dtype=dtype
        )

    yield Goal("gpt2-small: tokens/s", 540e3, value("tokens_per_s", "gpt2-small"))
    yield Goal("gpt2-small: speed-up over the best peer", 1.1, value("speedup", "gpt2-small"))
    yield Goal("gpt1: tokens/s", 560e3, value("tokens_per_s", "gpt1", 0.1))
    yield Goal("1.3b: tokens/s", 50e3, value("tokens_per_s", "1.3b"))
    half = _ratio(value("tokens_per_s", "gpt2-small", dtype="fp16"), value("tokens_per_s", "gpt2-small"))
    yield Goal("gpt2-small: speed in fp16 of that in bf16", 0.97, half)


def goals_table(found: list[Goal]) -> str:
    """Markdown."""
    says = {True: "yes", False: "**no**", None: "not measured"}
    rows = []
    for goal in found:
        wanted = f"{'at most' if goal.at_most else 'at least'} {goal.wanted:g}"
        rows.append([goal.text, wanted, "" if goal.found is None else f"{goal.found:.4g}", says[goal.met]])
    return timing.table(["goal", "wanted", "found", "met"], rows)
