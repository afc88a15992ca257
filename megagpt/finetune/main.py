"""Fine-tuning from the command line."""

import os

from megagpt import dist
from megagpt.errors import Stopped
from megagpt.train.folder import private
from megagpt.train.stopping import StopRequests, listening


def main(argv: list[str] | None = None) -> int:
    """Run ``finetune.py``; the process's exit code."""
    with listening() as stop:
        return dist.run_main(lambda: _main(argv, stop), on_orphan=stop.orphaned)


@private()
def _main(argv: list[str] | None, stop: StopRequests) -> None:
    from megagpt.config import deepspeed
    from megagpt.finetune.fields import parse

    settings = parse(argv)
    world = dist.resolve_world(os.environ)
    raw = deepspeed.load(settings.ds_config)

    from megagpt.finetune.plan import make_plan
    from megagpt.finetune.several import runs_of

    runs = runs_of(settings)
    plan = make_plan(runs[0], raw, world)
    if settings.preview:
        from megagpt.finetune.preview import preview

        if dist.is_main():
            preview(plan)
        return

    from megagpt.finetune import driver
    from megagpt.train.engine import stop_distributed

    device = driver.start(plan, world, stop)
    try:
        driver.finetune(plan, world, device, stop)
        for run in runs[1:]:
            driver.finetune(make_plan(run, raw, world), world, device, stop)
    except Stopped:  # on all ranks
        stop_distributed()
        raise
    # Only after success: a rank that failed alone must end, and not wait here for peers that wait for it.
    stop_distributed()
