"""A decoder with a head: what is fine-tuned."""

import torch
from torch import Tensor, nn

from megagpt.finetune import objective
from megagpt.finetune.heads import build_head
from megagpt.finetune.spec import TaskSpec
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import Ops

LM, TASK = "lm", "task"


class Classifier(nn.Module):
    """S sequences, T positions, U units, B examples, K outputs, as in :func:`megagpt.finetune.batches.collate`.

    ``objective`` (task or lm) says what ``forward`` minimises; ``lm_coef`` is lambda of the auxiliary language model.
    """

    def __init__(self, config: GPTConfig, spec: TaskSpec, ops: Ops) -> None:
        super().__init__()
        self.spec = spec
        self.gpt = GPT(config, ops)
        self.head = build_head(
            spec.head,
            d_model=config.d_model,
            n_layer=config.n_layer,
            n_outputs=spec.n_outputs,
            dropout=spec.head_dropout,
            ops=ops,
        )
        self.objective = TASK
        self.lm_coef = 0.0

    def forward(self, **batch: Tensor) -> Tensor:
        """This micro-batch's part of the loss: the sum over examples and sequences of loss times weight."""
        if self.objective == LM:
            return self._language_model(*self.gpt.hidden_and_words(batch["ids"], batch["rows"]), batch)
        # First: a pass that ends takes ZeRO-3's table of words away, which the language model needs.
        early = self._early(batch)
        if not self.lm_coef:
            return self._task(_joined(self._hidden(batch), early), batch)
        if self.spec.head == "scalar_mix":
            raise AssertionError("scalar_mix is trained without the auxiliary language model")
        hidden, words = self.gpt.hidden_and_words(batch["ids"], batch["rows"])
        return self._task(_joined(hidden, early), batch) + self.lm_coef * self._language_model(hidden, words, batch)

    @torch.no_grad()
    def _early(self, batch: dict[str, Tensor]) -> Tensor | None:
        """States of the rows behind those that are trained; None where gradients go through all."""
        if "early_ids" not in batch:
            return None
        n = len(batch["sequence"]) - len(batch["rows"])
        return self.gpt.hidden(batch["early_ids"], batch["early_rows"])[:n]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, K) in the model's type; -inf for a choice that an example does not have."""
        return self._logits(self._hidden(batch), batch)

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor | list[Tensor]:
        states = self.gpt.layers if self.spec.head == "scalar_mix" else self.gpt.hidden
        return states(batch["ids"], batch["rows"])

    def _task(self, hidden: Tensor | list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        losses = objective.task_losses(self.spec.kind, self._logits(hidden, batch), batch["targets"], self.spec.parents)
        return losses @ batch["example_weights"].to(losses.dtype)

    def _language_model(self, hidden: Tensor, words: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return objective.language_model_loss(self.gpt.ops, hidden, words, batch)

    def _logits(self, hidden: Tensor | list[Tensor], batch: dict[str, Tensor]) -> Tensor:
        features, owner = self.head.features(hidden, batch), batch["owner"]
        B = len(batch["example_weights"])
        if self.spec.kind == "choose":
            return _by_example(self.head(features, owner)[:, 0], owner, B)
        if len(owner) > B:  # both orders of two texts are summed
            features = torch.zeros(B, features.shape[1], dtype=features.dtype, device=features.device).index_add(
                0, owner, features
            )
        return self.head(features, None)


def _joined(hidden: Tensor | list[Tensor], early: Tensor | None) -> Tensor | list[Tensor]:
    return hidden if early is None else torch.cat([hidden, early])


def _by_example(scores: Tensor, owner: Tensor, B: int) -> Tensor:
    """(B, most choices) of scores (U,) that come in the order of their owners; -inf where there is none."""
    counts = torch.bincount(owner, minlength=B)
    place = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    table = torch.full((B, int(counts.max())), -torch.inf, dtype=scores.dtype, device=scores.device)
    return table.index_put((owner, place), scores)
