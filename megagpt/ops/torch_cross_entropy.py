"""Output projection and cross-entropy in one operation, over chunks of rows.

The logits of N rows over V words are the largest tensor of a small model by far (N V against N D). Here a chunk of them
lives at a time: its loss and its part of both gradients are computed while it is at hand, so the backward pass only
multiplies by the gradient that arrives.
"""

import torch
from torch import Tensor

from megagpt.errors import DataError

# Logits at once: on a CPU what caches hold, on a GPU 256 MiB in float32.
_CHUNK = {"cpu": 1 << 21}
_CHUNK_ELSEWHERE = 1 << 26


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """Mean over the targets that count of -log softmax(hidden weight^T)[target] + z_loss * log(sum exp)^2.

    hidden (N, D), weight (V, D), targets (N,) int64; a float32 scalar, 0 where every target is ``ignore_index``.
    Raises DataError for a target outside of 0..V-1 (on a GPU: stops the device, as nothing waits for its answer).
    """
    _check_targets(targets, weight.shape[0], ignore_index)
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index, z_loss)


def _check_targets(targets: Tensor, V: int, ignore_index: int) -> None:
    wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
    if targets.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"a target is outside of the vocabulary of {V}")
    elif wrong.any():
        raise DataError(
            f"target {targets[wrong][0].item()} is outside of the model's vocabulary of {V}: "
            "use the tokenizer the model was made for, or a larger --vocab_size"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are kept before the division by the number of targets: in float16 they would vanish after it."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ignore_index, z_loss):
        V = weight.shape[0]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        # 16-bit products are emulated on most CPUs, and slower than float32.
        product = exact if hidden.device.type == "cpu" else hidden.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        counts = (targets != ignore_index).to(exact)
        index = targets.masked_fill(targets == ignore_index, 0)
        words = weight.to(product)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        step = max(1, _CHUNK.get(hidden.device.type, _CHUNK_ELSEWHERE) // V)
        for begin in range(0, len(targets), step):
            chunk = slice(begin, begin + step)
            rows, count = hidden[chunk].to(product), counts[chunk]
            logits = (rows @ words.mT).to(exact)
            losses, d_logits = _losses(logits, index[chunk], z_loss, gradient=need_hidden or need_weight)
            total += losses @ count
            if need_hidden:
                torch.mul(d_logits.to(product) @ words, count[:, None], out=d_hidden[chunk])
            if need_weight:
                d_weight += d_logits.to(product).mT @ (rows * count[:, None]).to(product)
        n = counts.sum().clamp(min=1)
        ctx.save_for_backward(d_hidden, d_weight, n)
        ctx.weight_dtype = weight.dtype
        return total / n

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight, n = ctx.saved_tensors
        factor = d_loss / n
        if d_hidden is not None:
            d_hidden = d_hidden * factor
        if d_weight is not None:
            d_weight = (d_weight * factor).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def _losses(logits: Tensor, index: Tensor, z_loss: float, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The losses of a chunk's rows and, if asked for, their gradient with respect to the logits."""
    picked = logits.gather(1, index[:, None]).squeeze(1)
    if not gradient:
        lse = logits.logsumexp(1)
        return lse - picked + z_loss * lse**2, None
    probs = logits.softmax(1)
    # The largest probability is 1 / sum exp(logit - largest logit): cheaper than another pass of exponentials.
    lse = logits.amax(1) - probs.amax(1).log()
    losses = lse - picked + z_loss * lse**2
    if z_loss:
        probs *= (1 + 2 * z_loss * lse)[:, None]
    probs.scatter_add_(1, index[:, None], probs.new_full((len(index), 1), -1.0))
    return losses, probs
