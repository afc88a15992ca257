"""What every operation made of kernels has to do, whatever it computes."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def gradients(outputs, leaves: list[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
    """Of the sum of all outputs, each weighted by random numbers that are the same at every call."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return list(torch.autograd.grad(outputs, leaves, upstream, retain_graph=retain_graph))


def assert_serves_autograd(fn, leaves: list[Tensor]) -> None:
    """``fn(*leaves)`` has the same gradients bit by bit

    over runs, from one graph used twice, with recomputation instead of saved tensors, and from a graph that
    torch.compile traced without a break.
    """
    outputs = fn(*leaves)
    expected = gradients(outputs, leaves, retain_graph=True)
    again = {
        "from the same graph": gradients(outputs, leaves),
        "in another run": gradients(fn(*leaves), leaves),
        "with recomputation": gradients(checkpoint(fn, *leaves, use_reentrant=False), leaves),
        "compiled": gradients(torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves), leaves),
    }
    for way, found in again.items():
        assert all(map(torch.equal, found, expected)), way


def assert_captured_by_a_graph(fn, leaves: list[Tensor]) -> None:
    """A CUDA graph of forward and backward gives, for other values in the same memory, what running them gives."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gradients(fn(*leaves), leaves)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    upstream = torch.randn_like(fn(*leaves)[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(fn(*leaves)[0], leaves, upstream)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    expected = torch.autograd.grad(fn(*leaves)[0], leaves, upstream)
    assert all(map(torch.equal, captured, expected))
