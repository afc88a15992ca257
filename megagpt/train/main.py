"""Pre-training from the command line: read settings, check everything that can be wrong, build, resume, train.

The order is what a user needs: flags and settings files are checked before torch is imported, corpora before a process
group exists, and nothing is written before all of it holds.
"""

import fcntl
import os
import platform
import time
from pathlib import Path

from megagpt import dist
from megagpt.config import deepspeed as ds_config
from megagpt.config.fields import TrainSettings, parse
from megagpt.config.presets import model_preset, training_preset
from megagpt.errors import ConfigError, DataError, StorageError


def main(argv: list[str] | None = None) -> int:
    """Run ``train.py``; the process's exit code."""
    return dist.run_main(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    settings = parse(argv)
    world = dist.resolve_world(os.environ)
    raw = ds_config.load(settings.ds_config)
    shape = model_shape(settings)
    config = ds_config.resolve(
        raw, settings, world.world_size, path=settings.ds_config, hidden_size=shape["d_model"]
    )
    corpus = Corpus(settings, shape, config.global_batch)
    Run(settings, world, config, shape, corpus).run()
