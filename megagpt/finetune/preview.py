"""What a run would do, before anything runs: phases, groups, rates, and the schedule as a curve."""

from pathlib import Path

from megagpt.finetune.plan import FinetunePlan, PhasePlan
from megagpt.finetune.recipes import GROUPS

_MARKS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60


def preview(plan: FinetunePlan) -> None:
    """Print the phases of ``plan``, and draw its rates to schedule.png in the run folder where matplotlib is there."""
    print("\n".join(lines(plan)))
    if picture := draw(plan, plan.run_dir / "schedule.png"):
        print(f"drawn to {picture}")


def lines(plan: FinetunePlan) -> list[str]:
    """A table of the phases and under each its multiplier over its updates."""
    head = ["phase", "objective", "epochs", "updates", *GROUPS]
    rows = [head, *(_row(p) for p in plan.phases)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    shown = [f"recipe {plan.recipe.name}, head {plan.spec.head}: {plan.total_steps} updates", table[0]]
    for phase, row in zip(plan.phases, table[1:], strict=True):
        shown += [row, f"  {phase.phase.schedule:16} {curve(phase)}"]
    return [*shown, "numbers are the highest rate of each group; - is frozen"]


def _row(phase: PhasePlan) -> list[str]:
    rates = phase.phase.rates()
    return [
        phase.phase.name,
        phase.phase.objective,
        str(phase.phase.epochs),
        f"{phase.first}-{phase.end}",
        *(f"{rates[group]:.4g}" if group in rates else "-" for group in GROUPS),
    ]


def curve(phase: PhasePlan) -> str:
    """The schedule's multiplier over the phase, a character for each part of it."""
    schedule, n = phase.schedule(), min(_WIDTH, phase.steps)
    values = [schedule.multiplier(phase.first + i * phase.steps // n) for i in range(n)]
    return "".join(_MARKS[round(value * (len(_MARKS) - 1))] for value in values)


def draw(plan: FinetunePlan, path: Path) -> Path | None:
    """The rate of every group over all updates, as a picture; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for group in GROUPS:
        steps, rates = [], []
        for phase in plan.phases:
            highest = phase.phase.rates().get(group)
            steps += range(phase.first, phase.end)
            multiplier = phase.schedule().multiplier
            rates += [highest * multiplier(t) if highest else float("nan") for t in range(phase.first, phase.end)]
        axes.plot(steps, rates, label=group)
    axes.set(xlabel="update", ylabel="learning rate", yscale="symlog" if plan.recipe.name == "ulmfit" else "linear")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
