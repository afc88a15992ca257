"""Functions made of kernels as operations of torch: differentiable, and a single node of what torch.compile traces."""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable


def operation(
    name: str,
    forward: Callable,
    backward: Callable,
    *,
    fake: Callable,
    fake_backward: Callable,
    setup_context: Callable,
    derivative: Callable,
) -> Callable:
    """``forward`` with a derivative.

    ``forward`` and ``backward`` take and return tensors and numbers, as their annotations tell, and write to none of
    their arguments; the fakes return tensors of the same shapes, types and devices without data. They are registered as
    ``megagpt::name`` and ``megagpt::name_backward``. ``setup_context(ctx, inputs, output)`` keeps what
    ``derivative(ctx, backward, *gradients)`` needs to call backward and return one gradient for each input.
    """
    forward_op = torch.library.custom_op(f"megagpt::{name}", forward, mutates_args=())
    forward_op.register_fake(fake)
    backward_op = torch.library.custom_op(f"megagpt::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(
        lambda ctx, *gradients: derivative(ctx, backward_op, *gradients), setup_context=setup_context
    )

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            return derivative(ctx, backward, *gradients)

    def call(*inputs):
        # A registered operation costs the host some 100 us forward and backward that only a traced graph gains from.
        return forward_op(*inputs) if torch.compiler.is_compiling() else Eager.apply(*inputs)

    return call
