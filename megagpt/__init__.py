"""MegaGPT: generative pre-training and fine-tuning from a laptop's CPU to a cluster of GPUs."""

import os

from megagpt.version import __version__

# A checkpoint is data, not a program. DeepSpeed passes weights_only=False to torch.load; this variable overrides it,
# and it has to be set before torch loads anything.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

__all__ = ["__version__"]
