"""Output projection and cross-entropy in one operation that never holds the logits of all rows.

A chunk of rows lives at a time, in one buffer of the inputs' type: torch multiplies, one kernel replaces the logits by
their gradient in place, torch multiplies by that twice. The backward pass only scales what the forward pass kept.

N rows, D width, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megagpt_kernels.runtime import launch

EXTRA_BYTES = 512 * 10**6  # that a chunk's logits and the gradients may take together
BUFFER_BYTES = 256 * 10**6  # that logits get at least: 2,500 rows of GPT-2's vocabulary, enough for fast products
BLOCK = 1 << 14  # columns at once: 32 elements a thread for 16 warps, so that a multiprocessor has several rows
# Gradients of logits are probabilities: in float16 those below 3e-8 would vanish. The products scale back.
_GRADIENT_SCALE = {torch.float16: 256.0}
_ALIGNMENT = 64  # elements; of the buffer's rows, for loads of 16 bytes and fast products

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e38)  # below every logit; finite, so that differences are


@triton.jit
def _exp(x, top, EXACT: tl.constexpr):
    # exp(x - top) as a power of two. The product first is one instruction, and rounds more where logits are large.
    return tl.exp2((x - top) * _LOG2E if EXACT else x * _LOG2E - top * _LOG2E)


@triton.jit
def _scan_blocks(row_ptr, EXACT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    # The largest column of all blocks, and the sum of exp(column - largest). A maximum and a sum for every
    # COLUMNS of them: one more exponential for that many.
    places = tl.arange(0, BLOCK // COLUMNS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tops = tl.full((BLOCK // COLUMNS,), _LOWEST, tl.float32)
    totals = tl.zeros((BLOCK // COLUMNS,), tl.float32)
    for start in range(0, BLOCKS * BLOCK, BLOCK):
        # Read again later, from the L2 cache: few rows are in flight.
        x = tl.load(row_ptr + start + places, eviction_policy="evict_last").to(tl.float32)  # [BLOCK/COLUMNS, COLUMNS]
        higher = tl.maximum(tops, tl.max(x, 1))
        totals = totals * _exp(tops, higher, EXACT) + tl.sum(_exp(x, higher[:, None], EXACT), 1)
        tops = higher
    top = tl.max(tops, 0)
    return top, tl.sum(totals * _exp(tops, top, EXACT), 0)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (rows, stride), of which V columns count; with GRADIENT becomes the gradient times scale
    targets_ptr,  # (rows,)
    losses_ptr,  # (rows,)
    V,
    stride,
    ignore_index,
    z_loss,
    scale,
    GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,  # logits are float32
    BLOCKS: tl.constexpr,  # blocks before the last, which are read twice
    BLOCK: tl.constexpr,  # their columns
    LAST: tl.constexpr,  # columns of the last block, which stays in registers
):
    DTYPE: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    row_ptr = logits_ptr + row * stride
    columns = BLOCKS * BLOCK + tl.arange(0, LAST)  # [LAST]
    # The mask is the row's padded length, so that 8 neighbours share it and are loaded together.
    inside = columns < stride
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            tl.store(row_ptr + columns, tl.zeros((LAST,), DTYPE), mask=inside)
            if BLOCKS:
                for start in range(0, BLOCKS * BLOCK, BLOCK):
                    tl.store(row_ptr + start + tl.arange(0, BLOCK), tl.zeros((BLOCK,), DTYPE))
    else:
        seen = (target >= 0) & (target < V)
        picked = tl.load(row_ptr + target, mask=seen, other=0.0).to(tl.float32)
        top = _LOWEST
        if BLOCKS:
            top_before, total_before = _scan_blocks(row_ptr, EXACT, BLOCKS, BLOCK, 8)
            top = top_before
        x = tl.load(row_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(columns < V, x, float("-inf"))
        top = tl.maximum(tl.max(x, 0), top)
        powers = _exp(x, top, EXACT)
        total = tl.sum(powers, 0)
        if BLOCKS:
            total += total_before * _exp(top_before, top, EXACT)
        log_total = tl.log2(total) * _LN2
        lse = top + log_total
        # Not lse - picked: top is large where the loss is small.
        tl.store(losses_ptr + row, (top - picked) + log_total + z_loss * lse * lse)
        if GRADIENT:
            factor = scale * (1.0 + 2.0 * z_loss * lse) / total
            tl.debug_barrier()  # every thread has read the target's logit
            tl.store(row_ptr + columns, (powers * factor).to(DTYPE), mask=inside, eviction_policy="evict_first")
            if BLOCKS:
                for start in range(0, BLOCKS * BLOCK, BLOCK):
                    pointers = row_ptr + start + tl.arange(0, BLOCK)  # [BLOCK]
                    block = tl.load(pointers, eviction_policy="evict_first").to(tl.float32)
                    tl.store(pointers, (_exp(block, top, EXACT) * factor).to(DTYPE), eviction_policy="evict_first")
            tl.debug_barrier()  # the target's place has been written, and is corrected
            # p - 1 before the part of z_loss is added: the three cancel where p is close to 1.
            p = _exp(picked, top, EXACT) / total
            tl.store(row_ptr + target, (scale * ((p - 1.0) + 2.0 * z_loss * lse * p)).to(DTYPE), mask=seen)


@triton.jit
def _scale_kernel(x_ptr, out_ptr, numerator_ptr, denominator_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    factor = tl.load(numerator_ptr).to(tl.float32) / tl.load(denominator_ptr)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * factor).to(out_ptr.dtype.element_ty), mask=i < n)


def _rows_of_a_chunk(N: int, V: int, element_size: int, gradient_bytes: int) -> int:
    """As many rows as fit the buffer, in whole tiles of the products, no chunk much smaller than another."""
    row_bytes = triton.cdiv(V, _ALIGNMENT) * _ALIGNMENT * element_size
    most = max(1, max(BUFFER_BYTES, EXTRA_BYTES - gradient_bytes) // row_bytes)
    tile = min(most, 128)
    most -= most % tile
    rows = triton.cdiv(N, triton.cdiv(N, most))
    return triton.cdiv(rows, tile) * tile


def _replace_logits(logits: Tensor, targets: Tensor, losses: Tensor, ignore_index, z_loss, scale: float | None) -> None:
    """Write ``losses``, and the gradient times ``scale`` over ``logits`` (rows, V), unless scale is None."""
    rows, V = logits.shape
    blocks = triton.cdiv(V, BLOCK) - 1  # before the last
    last = triton.next_power_of_2(V - blocks * BLOCK)
    launch(
        _cross_entropy_kernel,
        (rows,),
        *(logits, targets, losses, V, logits.stride(0), ignore_index, z_loss, scale or 0.0),
        GRADIENT=scale is not None,
        EXACT=logits.dtype == torch.float32,
        BLOCKS=blocks,
        BLOCK=BLOCK,
        LAST=last,
        num_warps=max(1, (BLOCK if blocks else last) // 1024),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """total += factor * a b, with ``total`` in float32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=factor)
    elif total.is_cuda:  # since torch 2.10, the first that Triton 3.6 comes with
        torch.addmm(total, a, b, out_dtype=total.dtype, alpha=factor, out=total)
    else:  # in the interpreter
        total.addmm_(a.float(), b.float(), alpha=factor)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its gradients times n (empty where not needed; that of weight in float32), and n, targets that count.

    Undivided, because in float16 they would vanish as parts of a mean.
    """
    (N, D), V = hidden.shape, weight.shape[0]
    targets = targets.contiguous()
    counts = targets != ignore_index
    wrong = ((targets < 0) | (targets >= V)) & counts
    torch._assert_async(~wrong.any(), f"a target is outside of the vocabulary of {V}")
    n = counts.sum().clamp(min=1).to(torch.float32)
    losses = torch.empty(N, dtype=torch.float32, device=hidden.device)
    d_hidden = hidden.new_empty((N, D) if need_hidden else (0, D))
    d_weight = torch.zeros((V, D) if need_weight else (0, D), dtype=torch.float32, device=hidden.device)
    scale = _GRADIENT_SCALE.get(hidden.dtype, 1.0)
    step = _rows_of_a_chunk(N, V, hidden.element_size(), d_hidden.nbytes + d_weight.nbytes) if N else 1
    buffer = hidden.new_empty(min(step, N), triton.cdiv(V, _ALIGNMENT) * _ALIGNMENT)
    for begin in range(0, N, step):
        rows = hidden[begin : begin + step]
        chunk = slice(begin, begin + len(rows))
        logits = buffer[: len(rows), :V]
        torch.mm(rows, weight.mT, out=logits)
        gradient_scale = scale if need_hidden or need_weight else None
        _replace_logits(logits, targets[chunk], losses[chunk], ignore_index, z_loss, gradient_scale)
        if need_hidden:
            out = d_hidden[chunk]
            torch.addmm(out, logits, weight, beta=0, alpha=1 / scale, out=out)
        if need_weight:
            _add_product(d_weight, logits.mT, rows, 1 / scale)
    return losses.sum() / n, d_hidden, d_weight, n


def _backward(d_loss: Tensor, n: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * d_loss / n, multiplied in float32."""
    out = torch.empty_like(gradient, dtype=dtype)
    block = 4096
    if gradient.numel():
        grid = (triton.cdiv(gradient.numel(), block),)
        launch(_scale_kernel, grid, gradient, out, d_loss, n, gradient.numel(), BLOCK=block, num_warps=8)
    return out


@torch.library.custom_op("megagpt::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(hidden, weight, targets, ignore_index, z_loss, need_hidden, need_weight)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, ignore_index, z_loss, need_hidden, need_weight):
    loss, n = (hidden.new_empty((), dtype=torch.float32) for _ in range(2))
    d_hidden = hidden.new_empty((hidden.shape[0] if need_hidden else 0, hidden.shape[1]))
    d_weight = hidden.new_empty((weight.shape[0] if need_weight else 0, weight.shape[1]), dtype=torch.float32)
    return loss, d_hidden, d_weight, n


@torch.library.custom_op("megagpt::linear_cross_entropy_backward", mutates_args=())
def _scaled(d_loss: Tensor, n: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return _backward(d_loss, n, gradient, dtype)


@_scaled.register_fake
def _(d_loss, n, gradient, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _keep(ctx, inputs, output):
    _, d_hidden, d_weight, n = output
    ctx.save_for_backward(d_hidden, d_weight, n)
    ctx.mark_non_differentiable(d_hidden, d_weight, n)
    ctx.set_materialize_grads(False)
    ctx.weight_dtype = inputs[1].dtype
    ctx.needed = inputs[-2:]


def _gradients(ctx, d_loss, *_):
    d_hidden, d_weight, n = ctx.saved_tensors
    need_hidden, need_weight = ctx.needed
    return (
        _scaled(d_loss, n, d_hidden, d_hidden.dtype) if need_hidden else None,
        _scaled(d_loss, n, d_weight, ctx.weight_dtype) if need_weight else None,
        *[None] * 5,
    )


_linear_cross_entropy.register_autograd(_gradients, setup_context=_keep)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, z_loss: float = 0.0
) -> Tensor:
    """Mean over the targets that count of -log softmax(hidden weight^T)[target] + z_loss * log(sum exp)^2.

    hidden (N, D) and weight (V, D) of one dtype, float16, bfloat16 or float32, targets (N,) of an integer dtype; a
    float32 scalar, 0 where every target is ``ignore_index``. The gradients are computed here, where they are needed,
    weight's in float32. With them a call takes ``EXTRA_BYTES``, or as much as they and ``BUFFER_BYTES`` where that is
    more: at most 512 MB beside the gradients, whatever N and V.

    A target outside of 0..V-1 raises RuntimeError in the interpreter and stops a GPU, as nothing waits for its answer.
    """
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    return _linear_cross_entropy(hidden, weight, targets, ignore_index, z_loss, need_hidden, need_weight)[0]
