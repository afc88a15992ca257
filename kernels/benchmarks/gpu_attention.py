"""Causal self-attention and who else computes it."""

import functools
from collections.abc import Callable, Iterator

import gpu_peers
import torch
import torch.nn.functional as F
from gpu_peers import Absent
from gpu_problem import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import shapes
from megagpt.ops import torch_ops

_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SLOW_SHAPES = ("gpt2-small", "1.3b")  # where also those are timed that compile for many seconds
_SLOW = f"it compiles for many seconds at every shape: timed for {' and '.join(_SLOW_SHAPES)}, in bf16 without dropout"
_MOST_SCORES = 8 * 2**30  # bytes; plain torch keeps several tensors of this size


def problems(device: torch.device, wanted: tuple[str, ...], *, quick: bool) -> Iterator[Callable[[], Problem]]:
    """Makers of problems, the most important first."""
    for shape, dtype, dropout, few in _cases(device, quick):
        yield functools.partial(_problem, shape, dtype, dropout, device, wanted, few)


def _cases(device: torch.device, quick: bool) -> Iterator[tuple[shapes.Attention, torch.dtype, float, bool]]:
    """(shape, dtype, dropout, whether without what compiles for many seconds at every shape)."""
    if device.type != "cuda":
        for shape in shapes.SMALL_ATTENTION[: 1 if quick else None]:
            for dropout in (0.0, 0.1):
                yield shape, torch.float32, dropout, quick
        return
    models = shapes.MODEL_ATTENTION[: 1 if quick else None]
    for shape in models:
        for dropout in (0.0, 0.1):
            yield shape, torch.bfloat16, dropout, quick or dropout > 0 or shape.name not in _SLOW_SHAPES
    if quick:
        return
    for shape in (*shapes.SWEEP_ATTENTION, *shapes.ODD_ATTENTION):
        yield shape, torch.bfloat16, 0.0, True
    for shape in models:
        yield shape, torch.float16, 0.0, True
    for shape in shapes.WIDTH_ATTENTION:
        yield shape, torch.bfloat16, 0.0, True
    for shape in (*shapes.SWEEP_ATTENTION, *shapes.WIDTH_ATTENTION):
        yield shape, torch.bfloat16, 0.1, True
    for shape in models:
        yield shape, torch.float16, 0.1, True
    for shape in shapes.SWEEP_ATTENTION:
        yield shape, torch.float16, 0.0, True


def _problem(shape, dtype, dropout, device, wanted, few) -> Problem:
    B, H, T, K = shape.B, shape.H, shape.T, shape.K
    generator = torch.Generator(device).manual_seed(0)

    def random() -> Tensor:
        x = torch.randn(B, T, H, K, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return x.transpose(1, 2)  # as the projections before and after leave and want it

    inputs = {name: random().requires_grad_() for name in "qkv"}
    seed = torch.tensor(1234, device=device)
    makers = {
        "megagpt": functools.partial(_ours, dtype, dropout, seed, device),
        "megagpt, deterministic": functools.partial(_ours, dtype, dropout, seed, device, deterministic=True),
        "torch": functools.partial(_plain, shape, dtype, dropout),
        "torch.compile": functools.partial(_compiled, shape, dtype, dropout, device, few),
        **{name: gpu_peers.always(functools.partial(_sdpa, dropout, name)) for name in _BACKENDS},
        "flex": functools.partial(_flex, T, dropout, device, few),
    }
    if dropout:  # cuDNN takes multiples of 1/16 only in some versions
        makers["sdpa-cudnn, p 0.125"] = gpu_peers.always(functools.partial(_sdpa, 0.125, "sdpa-cudnn"))
    providers, absent = gpu_peers.collect(makers, wanted)
    definition = functools.partial(torch_ops.attention, dropout_p=dropout, seed=seed) if dropout else naive
    size = B * H * T * K * dtype.itemsize
    lse = 4 * B * H * T
    flops = 2.0 * B * H * T * T * K  # two products of 2 T^2 K, of which causality leaves half
    return Problem(
        "attention",
        shape.name,
        {"B": B, "H": H, "T": T, "K": K},
        dtype,
        dropout,
        inputs,
        (random(),),
        definition,
        providers,
        absent,
        own_masks=frozenset(name for name in providers if dropout and not name.startswith("megagpt")),
        undropped=naive if dropout else None,
        flops={"forward": flops, "backward": 2.5 * flops, "both": 3.5 * flops},
        bytes={"forward": 4 * size + lse, "backward": 8 * size + lse, "both": 12 * size + 2 * lse},
        part=_corners,
    )


def _corners(x: Tensor) -> Tensor:
    """The first and last head of the first and last sequence."""
    return x[:: max(1, x.shape[0] - 1), :: max(1, x.shape[1] - 1)]


def naive(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, every tensor written out; the softmax at least in float32."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1)
    scores = scores.masked_fill(future, float("-inf"))
    probs = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (F.dropout(probs, dropout_p) if dropout_p else probs) @ v


def _ours(dtype, dropout, seed, device, *, deterministic=False) -> Callable:
    options = {"dropout_p": dropout, "seed": seed if dropout else None, "deterministic": deterministic}
    return functools.partial(gpu_peers.kernels(dtype, device).attention, **options)


def _plain(shape, dtype, dropout) -> Callable:
    scores = shape.B * shape.H * shape.T**2 * dtype.itemsize
    if scores > _MOST_SCORES:
        raise Absent(f"the scores alone would take {scores / 2**30:.0f} GiB")
    return functools.partial(naive, dropout_p=dropout)


def _compiled(shape, dtype, dropout, device, few) -> Callable:
    if few:
        raise Absent(_SLOW)
    return gpu_peers.compiled(_plain(shape, dtype, dropout), device)


def _sdpa(dropout, name, q, k, v) -> Tensor:
    with sdpa_kernel(_BACKENDS[name]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


def _flex(T, dropout, device, few) -> Callable:
    if dropout:
        raise Absent("FlexAttention has no dropout")
    if device.type != "cuda":
        raise Absent("FlexAttention has a backward pass on GPUs only")
    if few:
        raise Absent(_SLOW)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)
    return functools.partial(gpu_peers.compiled(flex_attention, device), block_mask=mask)
