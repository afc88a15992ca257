"""A model in the form in which it is read fastest, one token of several texts at a time."""

import copy
import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from megagpt.model.blocks import Linear


def for_decoding(model, table: Tensor, rows: int) -> tuple[nn.Module, Callable]:
    """``model`` and the ``linear`` of its output projection ``table``, for up to ``rows`` rows at once.

    The model given stays as it is; the one returned has the same parameters, which must not change any more.
    """
    projections = [module for module in model.modules() if isinstance(module, Linear)]
    n_weights = table.numel() + sum(module.weight.numel() for module in projections)
    pack = model.ops.linear_packer(n_weights, rows=rows, like=table)
    return (model, model.ops.linear) if pack is None else (_twin(model, pack), pack(table))


def _twin(module: nn.Module, pack: Callable) -> nn.Module:
    """``module`` once more around the same parameters, its projections with packed weights."""
    twin = copy.copy(module)
    twin._modules = {name: _twin(child, pack) for name, child in module._modules.items()}
    if isinstance(module, Linear):
        twin.ops = dataclasses.replace(module.ops, linear=pack(module.weight))
    return twin
