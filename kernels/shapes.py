"""The shapes that kernels are compiled for and timed at: those of the models that the presets name.

B sequences, T positions, H heads, K width of a head, N = B T rows, D width, V vocabulary.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Causal self-attention of B x H heads."""

    name: str
    B: int
    H: int
    T: int
    K: int


@dataclass(frozen=True)
class Rows:
    """Element-wise work and norms: N rows of D."""

    name: str
    N: int
    D: int


@dataclass(frozen=True)
class Head:
    """The last projection and its loss: N rows of D against V words."""

    name: str
    N: int
    D: int
    V: int


MODEL_ATTENTION = (
    Attention("gpt1", 64, 12, 512, 64),
    Attention("gpt2-small", 32, 12, 1024, 64),
    Attention("1.3b", 8, 16, 2048, 128),
    Attention("1.3b, 32 heads", 8, 32, 2048, 64),
    Attention("6.7b", 4, 32, 2048, 128),
    Attention("13b", 4, 40, 2048, 128),
    Attention("gpt2-medium", 16, 16, 1024, 64),
    Attention("13b, T 4096", 2, 40, 4096, 128),
)
# 16k tokens of width 2048, as the FlashAttention-3 paper's figure 5 has them.
SWEEP_ATTENTION = tuple(
    Attention(f"T {T}, K {K}", 2**14 // T, 2048 // K, T, K)
    for K in (64, 128)
    for T in (512, 1024, 2048, 4096, 8192, 16384)
)
# Lengths off the tiles.
ODD_ATTENTION = tuple(Attention(f"T {T}", 16384 // T, 16, T, 64) for T in (500, 1000, 2047))
# Head widths of the tiny (32), 2.7b (80) and GPT-3 "large" (96) shapes, and the widest that is served.
WIDTH_ATTENTION = tuple(Attention(f"K {K}", 8, 16, 2048, K) for K in (32, 80, 96, 256))

WIDTHS = {"gpt1, gpt2-small": 768, "gpt2-medium": 1024, "1.3b": 2048, "6.7b": 4096, "13b": 5120}
NORM_ROWS = tuple(Rows(name, 32768, D) for name, D in WIDTHS.items())
GELU_ROWS = tuple(Rows(name, 32768, 4 * D) for name, D in WIDTHS.items())

HEADS = (
    Head("gpt1", 32768, 768, 40478),
    Head("gpt2-small", 32768, 768, 50257),
    Head("1.3b", 16384, 2048, 50257),
    Head("6.7b", 8192, 4096, 50257),
    Head("13b", 8192, 5120, 50257),
)

# For machines without a GPU.
SMALL_ATTENTION = (Attention("tiny", 2, 4, 64, 32), Attention("small", 2, 4, 256, 64))
SMALL_ROWS = (Rows("tiny", 8, 128), Rows("small", 4096, 768))
SMALL_HEADS = (Head("tiny", 32, 64, 501), Head("small", 1024, 256, 8192))
