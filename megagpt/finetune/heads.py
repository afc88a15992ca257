"""What stands on the decoder: from hidden states to logits.

S sequences, T positions, D width, U units (what the head reads once), K outputs. A head pools the states of each unit
to a vector; what is dropped of it and how it becomes logits is the head's too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.errors import ConfigError, nearest
from megagpt.model import init
from megagpt.model.blocks import Linear

HEADS = ("linear", "pooled_mlp", "scalar_mix")
_HIDDEN = 50  # of the multi-layer head, and the dropout before its last layer: the ULMFiT article's
_SECOND_DROPOUT = 0.1


def check_head(name: str) -> None:
    """Raise ConfigError for an unknown head."""
    if name not in HEADS:
        raise ConfigError(f"--head {name} is unknown{nearest(name, HEADS)}; choose one of {', '.join(HEADS)}")


def build_head(name: str, *, d_model: int, n_layer: int, n_outputs: int, dropout: float, ops) -> nn.Module:
    """The head ``name`` for ``n_outputs`` logits; ``dropout`` is of what its first layer reads."""
    check_head(name)
    if name == "pooled_mlp":
        return PooledMLP(d_model, n_outputs, dropout, ops)
    mix = n_layer + 1 if name == "scalar_mix" else 0
    return LinearHead(d_model, n_outputs, dropout, ops, mix=mix)


class LinearHead(nn.Module):
    """A projection of the state at the extract token; with ``mix`` of a learnt mean over that many layers (ELMo).

    h = gamma sum_j softmax(w)_j h_j, with w = 0 and gamma = 1 at first.
    """

    pools = False

    def __init__(self, d_model: int, n_outputs: int, dropout: float, ops, *, mix: int = 0) -> None:
        super().__init__()
        self.dropout = dropout
        self.mix = ScalarMix(mix) if mix else None
        self.output = Linear(d_model, n_outputs, init.STD, ops)

    def features(self, hidden: Tensor | list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        """(U, D)"""
        if self.mix is not None:
            return self.mix([h[batch["extract"]] for h in hidden])
        return hidden[batch["extract"]]

    def forward(self, features: Tensor, owner: Tensor | None) -> Tensor:
        """Logits of features (..., D). With ``owner``, those of one example are dropped alike."""
        return self.output(_drop(features, self.dropout, owner) if self.training else features)


class ScalarMix(nn.Module):
    """gamma sum_j softmax(w)_j h_j over layers (Peters et al. 2018, equation 1)."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.mix_weights = nn.Parameter(torch.zeros(n))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, layers: list[Tensor]) -> Tensor:
        shares = self.mix_weights.softmax(0)
        return self.gamma * sum(share * h for share, h in zip(shares, layers, strict=True))


class PooledMLP(nn.Module):
    """[h_T; max over tokens; mean over tokens] -> batch norm -> dropout -> 50 -> ReLU -> batch norm -> dropout -> K."""

    pools = True

    def __init__(self, d_model: int, n_outputs: int, dropout: float, ops) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_1 = BatchNorm(3 * d_model)
        self.inner = Linear(3 * d_model, _HIDDEN, init.STD, ops)
        self.norm_2 = BatchNorm(_HIDDEN)
        self.output = Linear(_HIDDEN, n_outputs, init.STD, ops)

    def features(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(U, 3 D) of hidden (N, D); max and mean over the tokens of all windows of a unit."""
        unit, last = batch["unit"], hidden[batch["extract"]]
        unit_of_row = unit[batch["sequence"]]
        top = torch.full_like(last, -torch.inf)
        top = top.scatter_reduce(0, unit_of_row[:, None].expand_as(hidden), hidden, "amax")
        total = torch.zeros_like(last).index_add(0, unit_of_row, hidden)
        count = torch.zeros_like(batch["owner"]).index_add(0, unit, batch["lengths"])
        return torch.cat([last, top, total / count[:, None].to(total.dtype)], 1)

    def forward(self, features: Tensor, owner: Tensor | None) -> Tensor:
        """Logits of features (N, 3 D). With ``owner``, those of one example are dropped alike."""
        x = self.norm_1(features)
        x = F.relu(self.inner(_drop(x, self.dropout, owner) if self.training else x))
        x = self.norm_2(x)
        return self.output(_drop(x, _SECOND_DROPOUT, owner) if self.training else x)


class BatchNorm(nn.BatchNorm1d):
    """Statistics are kept in float32 whatever the parameters' type, and those of each rank are its own."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self._apply(lambda x: x)  # under ZeRO-3 they are made in 16 bits

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        y = F.batch_norm(
            x.float(), self.running_mean, self.running_var, self.weight.float(), self.bias.float(),
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return y.to(x.dtype)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.running_mean, self.running_var = self.running_mean.float(), self.running_var.float()
        return self


def _drop(x: Tensor, p: float, owner: Tensor | None) -> Tensor:
    """Dropout of x (N, F); rows of one owner share a mask."""
    if not p:
        return x
    rows = len(x) if owner is None else int(owner.max()) + 1
    mask = F.dropout(torch.ones(rows, x.shape[1], dtype=x.dtype, device=x.device), p)
    return x * (mask if owner is None else mask[owner])
