"""Pre-training from the command line.

Flags and the DeepSpeed file are checked before torch is imported, so that a slip of the keyboard costs no seconds.
"""

import os

from megagpt import dist


def main(argv: list[str] | None = None) -> int:
    """Run ``train.py``; the process's exit code."""
    return dist.run_main(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    from megagpt.config import deepspeed
    from megagpt.config.fields import parse

    settings = parse(argv)
    world = dist.resolve_world(os.environ)
    raw = deepspeed.load(settings.ds_config)

    from megagpt.train.run import train

    train(settings, raw, world)
