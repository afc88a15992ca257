"""Pre-training from the command line.

Flags, the DeepSpeed file, corpora and model are checked before torch is imported: a slip of the keyboard costs no
seconds.
"""

import os

from megagpt import dist
from megagpt.train.folder import private
from megagpt.train.stopping import StopRequests, listening


def main(argv: list[str] | None = None) -> int:
    """Run ``train.py``; the process's exit code."""
    with listening() as stop:
        return dist.run_main(lambda: _main(argv, stop), on_orphan=stop.orphaned)


@private()
def _main(argv: list[str] | None, stop: StopRequests) -> None:
    from megagpt.config import deepspeed
    from megagpt.config.fields import parse
    from megagpt.train.plan import make_plan

    settings = parse(argv)
    world = dist.resolve_world(os.environ)
    plan = make_plan(settings, deepspeed.load(settings.ds_config), world)

    from megagpt.train.run import train

    train(plan, world, stop)
