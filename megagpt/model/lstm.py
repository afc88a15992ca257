"""A recurrent block in the place of attention and MLP, for the ablation that asks what the transformer brings.

"Improving Language Understanding by Generative Pre-Training", section 5: a single layer of 2,048 units with the same
data, tokens, heads and losses. What the paper leaves open: the block reads the embeddings of width D, and a projection
from its units back to D stands before the tied softmax and the heads. Order is in the state: no position table.
"""

from torch import Tensor, nn

from megagpt.model import init
from megagpt.model.blocks import Linear, Ragged
from megagpt.model.config import GPTConfig
from megagpt.ops import Ops


class LSTM(nn.LSTM):
    """One layer over (B, T, D); matrices drawn from N(0, 0.02^2), biases zero."""

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith("weight"):
                init.normal_(parameter, init.STD)
            else:
                nn.init.zeros_(parameter)


class RecurrentBlock(nn.Module):
    """An LSTM of ``config.d_ff`` units and a projection back to D. B batch, T positions, D width."""

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.dropout_p = config.resid_dropout
        self.dropout = ops.dropout
        self.rnn = LSTM(config.d_model, config.d_ff, batch_first=True)
        self.proj = Linear(config.d_ff, config.d_model, init.STD, ops)

    def forward(
        self, x: Tensor, _: None, seeds: tuple[Tensor | None, ...], ragged: Ragged | None = None
    ) -> tuple[Tensor, None]:
        states, _ = self.rnn(x if ragged is None else ragged.spread(x))
        y = self.proj(states if ragged is None else ragged.gather(states))
        return (y if seeds[2] is None else self.dropout(y, p=self.dropout_p, seed=seeds[2])), None
