"""Fused Triton kernels. This package knows nothing but torch and triton."""

from megagpt_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
