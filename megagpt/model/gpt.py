"""A decoder with tied embeddings: a transformer in GPT-1's (post-norm) or GPT-2's (pre-norm) order, or an LSTM."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.model.blocks import AddLayerNorm, Embedding, PostNormBlock, PreNormBlock, Ragged
from megagpt.model.cache import Layer
from megagpt.model.config import GPTConfig
from megagpt.model.lstm import RecurrentBlock
from megagpt.ops import Ops

_BLOCKS = {"pre": PreNormBlock, "post": PostNormBlock, "lstm": RecurrentBlock}


class GPT(nn.Module):
    """B batch, T positions, D width, V vocabulary.

    Sequences of unequal length are filled up to T; ``rows`` (N,) int64 then names the real ones of the B T positions,
    in order, and states are computed and returned for those alone: (N, D) in the place of (B, T, D). What fills a
    sequence up stands at its end.
    """

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.wte = Embedding(config.vocab_size, config.d_model)
        self.wpe = None if config.backbone == "lstm" else Embedding(config.seq_len, config.d_model)
        kind = "lstm" if config.backbone == "lstm" else config.norm
        self.blocks = nn.ModuleList(_BLOCKS[kind](config, ops) for _ in range(config.n_layer))
        self.ln_f = AddLayerNorm(config, ops, prenorm=False) if kind == "pre" else None

    def forward(self, ids: Tensor, targets: Tensor | None = None, *, rows: Tensor | None = None, then=None):
        """Logits (B, T, V), or with targets (B, T) int64 their mean cross-entropy in float32; -100 is ignored.

        ``then(hidden, words)`` makes something else of the states, of ``rows`` alone where they are given, and of the
        output projection's weight: within this call, for under ZeRO-3 that weight is whole for as long as it lasts.
        """
        hidden, words = self.hidden_and_words(ids, rows)
        if then is not None:
            return then(hidden, words)
        if targets is None:
            return self.ops.linear(hidden, words)
        return self.ops.linear_cross_entropy(hidden.flatten(0, 1), words, targets.flatten())

    def hidden(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        """What the output projection reads: (B, T, D) for ids (B, T) int64, T up to ``config.seq_len``."""
        return self._hidden(ids, rows, self._seeds(ids.device))

    def hidden_and_words(self, ids: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`hidden` and the output projection's weight (V, D), with the same dropout on the table in both."""
        seeds = self._seeds(ids.device)
        return self._hidden(ids, rows, seeds), self._table(self.wte, seeds[0])

    def layers(self, ids: Tensor, rows: Tensor | None = None) -> list[Tensor]:
        """The embeddings and the output of every block, L + 1 times (B, T, D); the last one as :meth:`hidden`."""
        seeds = self._seeds(ids.device)
        ragged = None if rows is None else Ragged(rows, ids.shape)
        x, residual = self._embed(ids, ragged, *seeds[:2]), None
        found = [x]
        for i, block in enumerate(self.blocks):
            x, residual = self._run(i, block, x, residual, seeds[2 + 3 * i : 5 + 3 * i], ragged)
            found.append(x if residual is None else x + residual)
        if self.ln_f is not None:
            found[-1] = self.ln_f(x, residual, seeds[-1])
        return found

    def next_logits(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of what follows ids (B, T), in evaluation mode."""
        return self.ops.linear(self.hidden(ids)[:, -1], self.wte.weight)

    def read(self, ids: Tensor, reading) -> Tensor:
        """:meth:`hidden` of ids (B, T) in evaluation mode by a ``cache.Prefill`` or a ``cache.Step``.

        Of sequences of unequal length it is that of the real tokens, (N, D). A transformer alone has such a memory.
        """
        none = (None,) * 3
        x, residual = self._embed(ids, reading.ragged, None, None, reading.positions), None
        for i, block in enumerate(self.blocks):
            x, residual = block(x, residual, none, reading.ragged, Layer(reading, i))
        return x if self.ln_f is None else self.ln_f(x, residual, None)

    def _hidden(self, ids: Tensor, rows: Tensor | None, seeds: tuple[Tensor | None, ...]) -> Tensor:
        ragged = None if rows is None else Ragged(rows, ids.shape)
        x, residual = self._embed(ids, ragged, *seeds[:2]), None
        for i, block in enumerate(self.blocks):
            x, residual = self._run(i, block, x, residual, seeds[2 + 3 * i : 5 + 3 * i], ragged)
        return x if self.ln_f is None else self.ln_f(x, residual, seeds[-1])

    def _embed(
        self,
        ids: Tensor,
        ragged: Ragged | None,
        seed: Tensor | None,
        position_seed: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Token plus position embeddings (B, T, D), of tokens alone where there is no position table.

        ``positions`` (T,) or (B, T) are 0 to T - 1 unless given.
        """
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        if ragged is not None:
            ids, positions = ids.flatten()[ragged.rows], ragged.rows % ids.shape[1]
        if self._drops_tables:
            words = F.embedding(ids, self._table(self.wte, seed))
            return words if self.wpe is None else words + F.embedding(positions, self._table(self.wpe, position_seed))
        x = self.wte(ids) if self.wpe is None else self.wte(ids) + self.wpe(positions)
        return self.ops.dropout(x, p=self.config.embd_dropout, seed=seed) if self.training else x

    @property
    def _drops_tables(self) -> bool:
        return self.training and self.config.embd_dropout_mode == "matrix"

    def _table(self, embedding: Embedding, seed: Tensor | None) -> Tensor:
        """The vectors of ``embedding``, with dropout on the table's elements where the config asks for it."""
        if self._drops_tables:
            return self.ops.dropout(embedding.weight, p=self.config.embd_dropout, seed=seed)
        return embedding.weight

    def _run(self, i, block, x, residual, seeds, ragged):
        every = self.config.activation_checkpointing
        if every and i % every == 0 and torch.is_grad_enabled():
            return checkpoint(block, x, residual, seeds, ragged, use_reentrant=False, preserve_rng_state=False)
        return block(x, residual, seeds, ragged)

    def _seeds(self, device) -> tuple[Tensor | None, ...]:
        """One for each dropout of a forward pass: two tables or their sum, three a block, the last residual sum."""
        n = 3 + 3 * len(self.blocks)
        if not self.training:
            return (None,) * n
        return torch.randint(2**63 - 1, (n,), device=device).unbind()


def decays(name: str) -> bool:
    """Whether weight decay applies: to every matrix, embeddings included, and to no bias or LayerNorm gain.

    By name: under ZeRO-3 a parameter has no shape to go by.
    """
    return name.rpartition(".")[2].startswith("weight") and ".ln_" not in f".{name}"
