"""Every generator that a checkpoint keeps."""

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every generator that a checkpoint keeps."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
