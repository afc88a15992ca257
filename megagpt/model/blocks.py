"""The parts of a decoder. B batch, T positions, D width, H heads, K = D / H width of one head.

Parameters are used only inside the forward of the module that owns them, where ZeRO-3 has gathered them. The exception
are embeddings, which ``GPT`` reads as tables: the token embedding is also the output projection.
"""

from typing import NamedTuple

from torch import Tensor, nn

from megagpt.model import init
from megagpt.model.config import GPTConfig
from megagpt.ops import Ops


class Ragged(NamedTuple):
    """Where N real tokens stand in B sequences that are filled up to T positions: ``rows`` (N,) of the B T.

    All that treats positions alike computes the real ones only; what mixes them spreads them out and gathers again.
    """

    rows: Tensor
    shape: tuple[int, int]  # B, T

    def spread(self, x: Tensor) -> Tensor:
        """(B, T, D) with zeros in the gaps, of x (N, D)."""
        B, T = self.shape
        return x.new_zeros(B * T, x.shape[1]).index_copy(0, self.rows, x).view(B, T, -1)

    def gather(self, y: Tensor) -> Tensor:
        """(N, D) of y (B, T, D)."""
        return y.flatten(0, 1).index_select(0, self.rows)


class Linear(nn.Linear):
    """A projection with bias whose weights start with the spread ``std``."""

    def __init__(self, n_in: int, n_out: int, std: float, ops: Ops) -> None:
        self.std = std  # before nn.Linear's constructor, which draws the values
        super().__init__(n_in, n_out)
        self.ops = ops

    def reset_parameters(self) -> None:
        init.normal_(self.weight, self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class LinearGelu(Linear):
    """A projection and GELU of it; the bias is added together with the GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.bias_gelu(self.ops.linear(x, self.weight), self.bias)


class Embedding(nn.Embedding):
    """A table of vectors drawn from N(0, 0.02^2)."""

    def reset_parameters(self) -> None:
        init.normal_(self.weight, init.STD)


class AddLayerNorm(nn.LayerNorm):
    """Dropout of a branch, the residual sum, and LayerNorm of it."""

    def __init__(self, config: GPTConfig, ops: Ops, *, prenorm: bool) -> None:
        super().__init__(config.d_model, eps=config.layer_norm_eps)
        self.dropout_p = config.resid_dropout
        self.prenorm = prenorm
        self.add_layer_norm = ops.add_layer_norm

    def forward(self, branch: Tensor, residual: Tensor | None, seed: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        """The normalised sum, with ``prenorm`` the pair of it and the sum. Without a residual or seed: no dropout."""
        p = self.dropout_p if residual is not None and seed is not None else 0.0
        return self.add_layer_norm(
            branch, residual, self.weight, self.bias, dropout_p=p, seed=seed, eps=self.eps, prenorm=self.prenorm
        )


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it."""

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout_p = config.attn_dropout
        self.qkv = Linear(config.d_model, 3 * config.d_model, init.STD, ops)
        self.proj = Linear(config.d_model, config.d_model, init.residual_std(config), ops)
        self.packed_attention = ops.packed_attention

    def forward(self, x: Tensor, seed: Tensor | None, ragged: Ragged | None = None, memory=None) -> Tensor:
        """x (B, T, D), or (N, D) with ``ragged``; the result is shaped alike. ``memory`` is a ``cache.Layer``."""
        qkv = self.qkv(x) if ragged is None else ragged.spread(self.qkv(x))
        B, T, D = *qkv.shape[:2], x.shape[-1]
        qkv = qkv.view(B, T, 3, self.n_head, D // self.n_head)
        if memory is not None:
            y = memory.attend(qkv)
        else:
            y = self.packed_attention(qkv, dropout_p=self.dropout_p if seed is not None else 0.0, seed=seed)
        y = y.reshape(B, T, D)
        return self.proj(y if ragged is None else ragged.gather(y))


class MLP(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.fc = LinearGelu(config.d_model, config.d_ff, init.STD, ops)
        self.proj = Linear(config.d_ff, config.d_model, init.residual_std(config), ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.fc(x))


class PreNormBlock(nn.Module):
    """x + Attn(LN(x)), then x + MLP(LN(x)) (GPT-2).

    The stream travels as (branch, residual), to be added by the next LayerNorm, so that dropout, sum and
    normalisation are one operation also between blocks.
    """

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.ln_1 = AddLayerNorm(config, ops, prenorm=True)
        self.attn = CausalSelfAttention(config, ops)
        self.ln_2 = AddLayerNorm(config, ops, prenorm=True)
        self.mlp = MLP(config, ops)

    def forward(
        self,
        branch: Tensor,
        residual: Tensor | None,
        seeds: tuple[Tensor | None, ...],
        ragged: Ragged | None = None,
        memory=None,
    ) -> tuple[Tensor, Tensor]:
        normed, x = self.ln_1(branch, residual, seeds[0])
        normed, x = self.ln_2(self.attn(normed, seeds[1], ragged, memory), x, seeds[2])
        return self.mlp(normed), x


class PostNormBlock(nn.Module):
    """LN(x + Attn(x)), then LN(x + MLP(x)) (GPT-1)."""

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, ops)
        self.ln_1 = AddLayerNorm(config, ops, prenorm=False)
        self.mlp = MLP(config, ops)
        self.ln_2 = AddLayerNorm(config, ops, prenorm=False)

    def forward(
        self, x: Tensor, _: None, seeds: tuple[Tensor | None, ...], ragged: Ragged | None = None, memory=None
    ) -> tuple[Tensor, None]:
        x = self.ln_1(self.attn(x, seeds[1], ragged, memory), x, seeds[2])
        return self.ln_2(self.mlp(x), x, seeds[0]), None
