"""A decoder-only transformer with tied embeddings, in GPT-1's (post-norm) and GPT-2's (pre-norm) order."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.model.blocks import AddLayerNorm, Embedding, PostNormBlock, PreNormBlock
from megagpt.model.config import GPTConfig
from megagpt.ops import Ops


class GPT(nn.Module):
    """B batch, T positions, D width, V vocabulary."""

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.wte = Embedding(config.vocab_size, config.d_model)
        self.wpe = Embedding(config.seq_len, config.d_model)
        block = PreNormBlock if config.norm == "pre" else PostNormBlock
        self.blocks = nn.ModuleList(block(config, ops) for _ in range(config.n_layer))
        self.ln_f = AddLayerNorm(config, ops, prenorm=False) if config.norm == "pre" else None

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V), or with targets (B, T) int64 their mean cross-entropy in float32; -100 is ignored."""
        hidden = self.hidden(ids)
        if targets is None:
            return F.linear(hidden, self.wte.weight)
        return self.ops.linear_cross_entropy(hidden.flatten(0, 1), self.wte.weight, targets.flatten())

    def hidden(self, ids: Tensor) -> Tensor:
        """What the output projection reads: (B, T, D) for ids (B, T) int64, T up to ``config.seq_len``."""
        seeds = self._seeds(ids.device)
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        if self.training:
            x = self.ops.dropout(x, p=self.config.embd_dropout, seed=seeds[0])
        residual = None
        for i, block in enumerate(self.blocks):
            x, residual = self._run(i, block, x, residual, seeds[1 + 3 * i : 4 + 3 * i])
        return x if self.ln_f is None else self.ln_f(x, residual, seeds[-1])

    def _run(self, i, block, x, residual, seeds):
        every = self.config.activation_checkpointing
        if every and i % every == 0 and torch.is_grad_enabled():
            return checkpoint(block, x, residual, seeds, use_reentrant=False, preserve_rng_state=False)
        return block(x, residual, seeds)

    def _seeds(self, device) -> tuple[Tensor | None, ...]:
        n = 2 + 3 * len(self.blocks)
        if not self.training:
            return (None,) * n
        return torch.randint(2**63 - 1, (n,), device=device).unbind()


def decays(name: str, parameter: Tensor | None = None) -> bool:
    """Whether weight decay applies: to every matrix, embeddings included, and to no bias or LayerNorm gain.

    By name: under ZeRO-3 a parameter has no shape to go by.
    """
    return name.endswith(".weight") and ".ln_" not in f".{name}"
