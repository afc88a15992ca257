"""Output projection and cross-entropy in one operation, over chunks of rows.

The logits of N rows over V words are the largest tensor of a small model by far (N V against N D). Here a chunk of them
lives at a time: its loss and its part of both gradients are computed while it is at hand, so the backward pass only
multiplies by the gradient that arrives.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megagpt.errors import DataError
from megagpt.ops.precision import product_dtype

# Logits at once: on a CPU what caches hold, but enough rows for a fast product; on a GPU 256 MiB in float32.
_CPU_LOGITS, _CPU_ROWS = 1 << 21, 256
_LOGITS = 1 << 26


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """Mean over the targets that count of -log softmax(hidden weight^T)[target] + z_loss * log(sum exp)^2.

    hidden (N, D), weight (V, D), targets (N,) int64; a float32 scalar, 0 where every target is ``ignore_index``.
    Raises DataError for a target outside of 0..V-1 (on a GPU, which nothing waits for, the device stops instead).
    """
    ignored = targets == ignore_index
    index = targets.masked_fill(ignored, 0)
    _check(index, weight.shape[0])
    counted = ~ignored
    return _LinearCrossEntropy.apply(hidden, weight, index, counted, counted.sum().clamp(min=1), z_loss)


def weighted_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    """Sum over rows of ``row_weights`` times -log softmax(hidden weight^T)[target].

    hidden (N, D), weight (V, D), targets (N,) int64, row_weights (N,) of at least 0; a float32 scalar. Raises DataError
    for a target outside of 0..V-1, as :func:`linear_cross_entropy` does.
    """
    _check(targets, weight.shape[0])
    # Relative to the largest, for products in 16 bits; the scale comes back when all is summed.
    scale = row_weights.amax().clamp(min=torch.finfo(row_weights.dtype).tiny)
    return _LinearCrossEntropy.apply(hidden, weight, targets, row_weights / scale, 1.0 / scale, 0.0)


def _check(index: Tensor, V: int) -> None:
    wrong = (index < 0) | (index >= V)
    if index.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"a target is outside of the vocabulary of {V}")
    elif wrong.any():
        raise DataError(
            f"target {index[wrong][0].item()} is outside of the model's vocabulary of {V}: "
            "use the tokenizer the model was made for, or a larger --vocab_size"
        )


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of ``counted`` times loss, divided by ``divisor``.

    Gradients are kept before the division: in float16 they would vanish after it.
    """

    @staticmethod
    def forward(ctx, hidden, weight, index, counted, divisor, z_loss):
        exact, product = torch.promote_types(hidden.dtype, torch.float32), product_dtype(hidden)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden, dtype=product) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        words, counts, kept = weight.to(product), counted.to(exact), counted.to(product)[:, None]
        total = torch.zeros((), dtype=exact, device=hidden.device)
        for chunk in _chunks(len(hidden), len(weight), hidden.device.type):
            rows = hidden[chunk].to(product)
            logits = (rows @ words.mT).to(exact)
            losses, d_logits = _losses(logits, index[chunk], z_loss, gradient=need_hidden or need_weight)
            total += losses @ counts[chunk]
            if d_logits is None:
                continue
            d_logits = d_logits.to(product)
            if need_hidden:
                torch.mm(d_logits, words, out=d_hidden[chunk]).mul_(kept[chunk])
            if need_weight:
                _add_product(d_weight, d_logits.mT, rows * kept[chunk])
        divisor = divisor.to(exact)
        ctx.save_for_backward(d_hidden, d_weight, divisor)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss):
        *grads, divisor = ctx.saved_tensors
        factor = d_loss / divisor
        grads = (g if g is None else (g * factor).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return *grads, None, None, None, None


def _chunks(N: int, V: int, device_type: str) -> list[slice]:
    step = max(_CPU_ROWS, _CPU_LOGITS // V) if device_type == "cpu" else max(1, _LOGITS // V)
    return [slice(begin, begin + step) for begin in range(0, N, step)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, also where the products are in fewer bits than their sum."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


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
