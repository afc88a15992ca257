"""Pictures of a report, one for each operation: device and versions stand in the title."""

from pathlib import Path

from gpu_report import Report


def draw(report: Report, stem: Path) -> list[Path]:
    """Write <stem>-<op>.png for every operation that was timed; the paths. Nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    paths = []
    timed = [row for row in report.rows if row["status"] == "timed"]
    for op in dict.fromkeys(row["op"] for row in timed):
        paths.append(_draw_op(report, op, [row for row in timed if row["op"] == op], stem))
    if any(step["status"] == "timed" for step in report.steps):
        paths.append(_draw_steps(report, stem))
    return paths


def _draw_op(report: Report, op: str, rows: list[dict], stem: Path) -> Path:
    """A panel for each pass, dtype and dropout, bars for each shape and provider."""
    from matplotlib import pyplot as plt

    keys = list(dict.fromkeys((row["dtype"], row["dropout"], row["pass"]) for row in rows))
    figure, panels = plt.subplots(len(keys), 1, figsize=(14, 3.2 * len(keys)), squeeze=False, layout="constrained")
    for key, panel in zip(keys, panels[:, 0], strict=True):
        chosen = [row for row in rows if (row["dtype"], row["dropout"], row["pass"]) == key]
        value = "tflops" if chosen[0]["bound"] == "matmul" else "gb_per_s"
        unit = {"tflops": "TFLOP/s", "gb_per_s": "GB/s"}[value]
        _bars(panel, [(row["shape"], row["provider"], row[value]) for row in chosen])
        floors = {row["shape"]: row[value] * 100 / row["percent_of_floor"] for row in chosen}
        panel.plot(list(floors.values()), "k_", markersize=40, label="at the floor")
        panel.set_ylabel(unit)
        panel.set_title(f"{op}, {key[2]}, {key[0]}, dropout {key[1]:g}", fontsize=9)
        panel.legend(fontsize=7, ncols=5, markerscale=0.25)
    return _save(figure, report, stem, op)


def _draw_steps(report: Report, stem: Path) -> Path:
    """Tokens per second of each model and backend, and where the time of a step goes."""
    from matplotlib import pyplot as plt

    steps = [step for step in report.steps if step["status"] == "timed"]
    figure, (rates, kinds) = plt.subplots(2, 1, figsize=(14, 8), layout="constrained")
    names = {id(step): f"{step['model']} {step['dtype']} p={step['dropout']:g}" for step in steps}
    _bars(rates, [(names[id(step)], step["backend"], step["tokens_per_s"]) for step in steps])
    rates.set_ylabel("tokens/s")
    rates.legend(fontsize=7, ncols=4)
    stacked = [step for step in steps if step["kinds"]]
    for kind in dict.fromkeys(kind for step in stacked for kind in step["kinds"]):
        values = [step["kinds"].get(kind, 0) for step in stacked]
        below = [sum(_until(step["kinds"], kind)) for step in stacked]
        kinds.bar(range(len(stacked)), values, bottom=below, label=kind)
    kinds.set_xticks(range(len(stacked)), [f"{names[id(s)]}\n{s['backend']}" for s in stacked], fontsize=7)
    kinds.set_ylabel("ms a step")
    kinds.legend(fontsize=7, ncols=4)
    return _save(figure, report, stem, "model")


def _until(kinds: dict[str, float], kind: str) -> list[float]:
    return list(kinds.values())[: list(kinds).index(kind)] if kind in kinds else [0]


def _bars(panel, values: list[tuple[str, str, float]]) -> None:
    """Groups of bars from (group, bar, height)."""
    groups = list(dict.fromkeys(group for group, _, _ in values))
    names = list(dict.fromkeys(name for _, name, _ in values))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        chosen = [(groups.index(group), height) for group, each, height in values if each == name]
        panel.bar(
            [x + (i - len(names) / 2 + 0.5) * width for x, _ in chosen], [h for _, h in chosen], width, label=name
        )
    panel.set_xticks(range(len(groups)), groups, fontsize=7, rotation=20 if len(groups) > 8 else 0)


def _save(figure, report: Report, stem: Path, name: str) -> Path:
    from matplotlib import pyplot as plt

    versions = (f"{key} {report.on[key]}" for key in ("device", "torch", "triton"))
    figure.suptitle(", ".join(versions), fontsize=10)
    path = stem.with_name(f"{stem.name}-{name}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
