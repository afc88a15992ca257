"""Fused Triton kernels. This package knows nothing but torch and triton."""
