"""Attention as operations of torch: from (q, k, v), and from the packed projection of all three.

B batch, H heads, K width of one head, Tq and Tkv positions of queries and keys. With ``causal`` query i of Tq sees key
j of Tkv if j <= i + Tkv - Tq: queries are the last positions, as in decoding; a query that sees no key gives 0.
"""

import torch
from torch import Tensor

from megagpt_kernels.attention_backward import backward
from megagpt_kernels.attention_forward import Setting, forward
from megagpt_kernels.attention_parts import WIDTHS
from megagpt_kernels.operation import operation

Saved = tuple[Tensor, Tensor, Tensor, Tensor]  # out, log-sum-exp, dropout keys, bounds of documents


def _unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v, each (B, H, T, K), of (B, T, 3, H, K)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _readable(x: Tensor) -> Tensor:
    """x with unit stride in K, which is all that kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_saved(q: Tensor, Tkv: int, dropout_p: float, cu_seqlens: Tensor | None) -> Saved:
    """As :func:`forward` returns, without values."""
    B, H, Tq, K = q.shape
    return (
        q.new_empty(B, Tq, H, K),
        q.new_empty(B * H, Tq, dtype=torch.float32),
        q.new_empty(B * H * (Tq + Tkv) if dropout_p else 0, dtype=torch.int32),
        q.new_empty(2, 0 if cu_seqlens is None else Tkv, dtype=torch.int32),
    )


def _empty_heads(x: Tensor) -> Tensor:
    """(B, H, T, K) like x, in the order (B, T, H, K)."""
    B, H, T, K = x.shape
    return x.new_empty(B, T, H, K).transpose(1, 2)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float,
    deterministic: bool,
) -> Saved:
    setting = Setting(causal, dropout_p, scale, deterministic)
    return forward(_readable(q), _readable(k), _readable(v), seed, cu_seqlens, setting)


def _fake(q, k, v, seed, cu_seqlens, causal, dropout_p, scale, deterministic):
    return _empty_saved(q, k.shape[2], dropout_p, cu_seqlens)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    bounds: Tensor,
    causal: bool,
    dropout_p: float,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    setting = Setting(causal, dropout_p, scale, deterministic)
    grads = _empty_heads(q), _empty_heads(k), _empty_heads(v)
    backward(_readable(dout), _readable(q), _readable(k), _readable(v), out, lse, keys, bounds, setting, *grads)
    return grads


def _fake_backward(dout, q, k, v, *others):
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


def _packed_forward(
    qkv: Tensor, seed: Tensor | None, cu_seqlens: Tensor | None, dropout_p: float, scale: float, deterministic: bool
) -> Saved:
    return forward(*_unpack(_readable(qkv)), seed, cu_seqlens, Setting(True, dropout_p, scale, deterministic))


def _packed_fake(qkv, seed, cu_seqlens, dropout_p, scale, deterministic):
    return _empty_saved(_unpack(qkv)[0], qkv.shape[1], dropout_p, cu_seqlens)


def _packed_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: Tensor,
    bounds: Tensor,
    dropout_p: float,
    scale: float,
    deterministic: bool,
) -> Tensor:
    setting = Setting(True, dropout_p, scale, deterministic)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    inputs = _unpack(_readable(qkv))
    backward(_readable(dout), *inputs, out, lse, keys, bounds, setting, *_unpack(dqkv))
    return dqkv


def _packed_fake_backward(dout, qkv, *others):
    return qkv.new_empty(qkv.shape)


def _save(n_inputs: int):
    """What the backward pass needs: the first inputs, all outputs, and the numbers that follow seed and documents."""

    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:n_inputs], *output)
        ctx.numbers = inputs[n_inputs + 2 :]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # only ``out`` has a gradient

    return setup_context


def _derivative(ctx, backward, dout, *_):
    return *backward(dout, *ctx.saved_tensors, *ctx.numbers), *[None] * 6


def _packed_derivative(ctx, backward, dout, *_):
    return backward(dout, *ctx.saved_tensors, *ctx.numbers), *[None] * 5


_attention = operation(
    "attention",
    _forward,
    _backward,
    fake=_fake,
    fake_backward=_fake_backward,
    setup_context=_save(3),
    derivative=_derivative,
)
_packed_attention = operation(
    "packed_attention",
    _packed_forward,
    _packed_backward,
    fake=_packed_fake,
    fake_backward=_packed_fake_backward,
    setup_context=_save(1),
    derivative=_packed_derivative,
)


def _numbers(q: Tensor, seed: Tensor | None, dropout_p: float, scale: float | None, deterministic: bool | None):
    """(dropout_p, scale, deterministic) with their defaults filled in."""
    K = q.shape[-1]
    if K not in WIDTHS:
        raise ValueError(f"head width {K} is not one of {', '.join(map(str, WIDTHS))}; use torch's attention for it")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale {scale} is not positive; negate q instead")
    if dropout_p and seed is None:
        raise ValueError(f"dropout_p {dropout_p} needs a seed; pass a 0-d int64 tensor on {q.device}")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return dropout_p, K**-0.5 if scale is None else scale, deterministic


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """dropout(softmax(scale * q k^T)) v for q (B, H, Tq, K), k and v (B, H, Tkv, K): (B, H, Tq, K).

    float16, bfloat16 or float32, strides as they come; the result lies in memory as (B, Tq, H, K). ``seed`` (0-d
    int64, on the device) draws the dropout masks. ``cu_seqlens`` (n + 1,), int32 or int64, ascending from 0 to Tkv, are
    the positions where packed documents begin: none sees another; they hold for every row of the batch. The gradient
    has the same bits in every run if ``deterministic``, by default as torch.use_deterministic_algorithms says.
    Raises ValueError for a head width that is not served, a scale that is not positive, and dropout without a seed.
    """
    numbers = _numbers(q, seed, dropout_p, scale, deterministic)
    return _attention(q, k, v, seed, cu_seqlens, causal, *numbers)[0].transpose(1, 2)


def packed_attention(
    qkv: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Causal :func:`attention` of q, k, v side by side, (B, T, 3, H, K), as one projection returns them: (B, T, H, K).

    Its gradient is packed likewise: neither pass copies what a projection reads or writes.
    """
    return _packed_attention(qkv, seed, cu_seqlens, *_numbers(qkv, seed, dropout_p, scale, deterministic))[0]
