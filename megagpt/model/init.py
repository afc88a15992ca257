"""The initial value of every parameter.

| tensor                                               | pre-norm (GPT-2)        | post-norm (GPT-1) |
|------------------------------------------------------|-------------------------|-------------------|
| token and position embeddings, projections           | N(0, 0.02^2)            | N(0, 0.02^2)      |
| projections that write to the residual stream        | N(0, (0.02/sqrt(2L))^2) | N(0, 0.02^2)      |
| biases                                               | 0                       | 0                 |
| LayerNorm gains                                      | 1                       | 1                 |

A parameter gets its values inside the constructor of the module that owns it: under ZeRO-3 it is split over the ranks
as soon as that constructor returns. Values are drawn in float32 by a generator of the parameter's own, seeded from
torch's default generator in order of construction, so they depend on nothing but ``torch.manual_seed`` and the kind of
device: not on the precision, the ZeRO stage or the number of ranks.
"""

import torch
from torch import nn

from megagpt.model.config import GPTConfig

STD = 0.02


def residual_std(config: GPTConfig) -> float:
    """Spread of the projections that write to the residual stream, of which a model has two a block."""
    return STD if config.norm == "post" else STD / (2 * config.n_layer) ** 0.5


@torch.no_grad()
def normal_(parameter: nn.Parameter, std: float) -> None:
    """Fill ``parameter`` from N(0, std^2); on the meta device only the seed is drawn."""
    seed = _next_seed()
    if parameter.is_meta:
        return
    generator = torch.Generator(parameter.device).manual_seed(seed)
    # torch.normal and not parameter.normal_: float32 also where DeepSpeed has made the parameter 16-bit.
    values = torch.normal(0.0, std, parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
    parameter.copy_(values)


def _next_seed() -> int:
    """An explicit device: construction may run under ``torch.device("meta")``."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
