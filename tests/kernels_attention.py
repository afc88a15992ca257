"""What tests of attention share: inputs, results with gradients, and how accurate they have to be."""

import pytest
import torch

from megagpt.ops import torch_ops
from megagpt_kernels import attention, attention_tiles
from megagpt_kernels.attention_tiles import Tile

QUERIES, KEYS = 16, 32
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def use_tiles(monkeypatch, queries=QUERIES, keys=KEYS, *, descriptors=False):
    tile = Tile(queries, keys, warps=4, stages=1, descriptors=descriptors)
    monkeypatch.setattr(attention_tiles, "choose", lambda *_, **__: tile)


def make_inputs(B, H, Tq, Tkv, K, dtype=torch.float32, device="cpu", seed=0):
    """q, k, v and the gradient of the output, which lies in memory as a projection's gradient does."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, Tq, H, K), (B, Tkv, H, K), (B, Tkv, H, K), (B, Tq, H, K)
    return [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for shape in shapes]


def results(function, q, k, v, dout, dtype=None, **options):
    """The output and the gradients of ``function``."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v)]
    out = function(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, dout.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def assert_as_accurate(ours, theirs, truth, factor=2.0):
    """Errors are compared, not values: ours against float64 may be ``factor`` times torch's in the same dtype.

    Where the truth is 0, as dq and dk for a single token, a sum in float32 of larger terms that cancel remains.
    """
    cancelled = 4 * torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in truth.values())
    for name in truth:
        error = (ours[name].double() - truth[name]).abs().max().item()
        baseline = (theirs[name].double() - truth[name]).abs().max().item()
        floor = torch.finfo(ours[name].dtype).eps * truth[name].abs().max().item() + cancelled
        assert error <= factor * baseline + floor, f"{name}: error {error:.2e}, torch's own {baseline:.2e}"


def check(inputs, deterministic=False, **options):
    assert_as_accurate(
        ours=results(attention, *inputs, **options, deterministic=deterministic),
        theirs=results(torch_ops.attention, *inputs, **options),
        truth=results(torch_ops.attention, *inputs, **options, dtype=torch.float64),
    )
