"""Fused Triton kernels. This package knows nothing but torch and triton."""

from megagpt_kernels.add_layer_norm import add_layer_norm, layer_norm
from megagpt_kernels.attention import attention, packed_attention
from megagpt_kernels.bias_gelu import bias_gelu
from megagpt_kernels.dropout import dropout
from megagpt_kernels.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "dropout",
    "layer_norm",
    "linear_cross_entropy",
    "packed_attention",
]
