"""What is minimised: the task's loss plus ``lm_coef`` times the language model's on the same sequences.

L3 = mean over examples of the task's loss + lambda * mean over sequences of the mean loss of a sequence's next tokens
(Radford et al. 2018, equations 4 and 5, with the means of their released code). K outputs, B examples.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def task_losses(kind: str, logits: Tensor, targets: Tensor, parents: tuple[int | None, ...] = ()) -> Tensor:
    """Each example's loss (B,) in float32 or wider from its logits (B, K), -inf where a choice is missing.

    Cross-entropy with targets (B,) int64 or soft (B, K); for multilabel the mean over the labels of the binary
    cross-entropy with targets (B, K); for regress the squared error with targets (B,).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "regress":
        return (logits[:, 0] - targets) ** 2
    if kind == "multilabel":
        log_p, log_not_p = label_log_probabilities(logits, parents)
        return -(targets * log_p + (1 - targets) * log_not_p).mean(1)
    return F.cross_entropy(logits, targets, reduction="none")


def label_log_probabilities(logits: Tensor, parents: tuple[int | None, ...] = ()) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p) of every label, (B, K) each: p = sigmoid(z), times its parent's p in a hierarchy.

    ``parents`` come before their children.
    """
    log_s, log_not_s = F.logsigmoid(logits), F.logsigmoid(-logits)
    if not any(parent is not None for parent in parents):
        return log_s, log_not_s
    log_p, log_not_p = list(log_s.unbind(1)), list(log_not_s.unbind(1))
    for k, parent in enumerate(parents):
        if parent is not None:
            # 1 - s p = (1 - s) + s (1 - p), without a difference that cancels
            log_not_p[k] = torch.logaddexp(log_not_p[k], log_p[k] + log_not_p[parent])
            log_p[k] = log_p[k] + log_p[parent]
    return torch.stack(log_p, 1), torch.stack(log_not_p, 1)


def outputs(kind: str, logits: Tensor, *, ordinal: bool = False, parents: tuple[int | None, ...] = ()) -> Tensor:
    """What the model answers: probabilities (B, K); numbers (B,) for regress and, their mean, for ordered classes."""
    logits = logits.double()
    if kind == "regress":
        return logits[:, 0]
    if kind == "multilabel":
        return label_log_probabilities(logits, parents)[0].exp()
    probabilities = logits.softmax(1)
    if ordinal:
        return probabilities @ torch.arange(logits.shape[1], dtype=torch.float64, device=logits.device)
    return probabilities


def language_model_loss(ops, hidden: Tensor, words: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Sum over sequences of their weight times the mean loss of their tokens after the first.

    hidden (N, D), words (V, D), and a batch as of :func:`megagpt.finetune.batches.collate`.
    """
    predicting = batch["predicting"]
    if not len(predicting):
        return hidden.sum() * 0.0
    weights = batch["sequence_weights"] / (batch["lengths"] - 1).clamp(min=1)
    targets = batch["ids"].flatten()[batch["rows"][predicting] + 1]
    return ops.weighted_cross_entropy(hidden[predicting], words, targets, weights[batch["sequence"][predicting]])
