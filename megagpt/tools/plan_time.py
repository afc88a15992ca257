"""How long a step takes: matrix products, attention, element-wise passes, the update, and what collectives add.

Products run at the share of the peak that is fitted to published runs (docs/plan.md), attention at the share that
FlashAttention-2 reaches on an H100, element-wise kernels and the update at a share of the memory's speed. Collectives
take a latency and their bytes over the ring's bandwidth; those that DeepSpeed issues beside computation hide behind it,
the longer of the two counts. Not modelled: slower links between some nodes, stragglers, and what the launch of kernels
costs a small model.
"""

import math
from dataclasses import dataclass

from megagpt.model.config import GPTConfig
from megagpt.tools.plan_hardware import (
    LATENCY,
    LINK_SHARE,
    MEMORY_SHARE,
    NETWORK_LATENCY,
    Gpu,
    bus_bandwidth,
)
from megagpt.tools.plan_memory import Layout, recomputed
from megagpt.tools.plan_model import parameters
from megagpt.tools.plan_traffic import Collective

# FlashAttention-2 on an H100, causal, forward and backward, TFLOP/s at 512 to 16k positions (Dao-AILab/flash-attention
# assets/flash2_h100_fwd_bwd_benchmark.png); heads of 64 and of 128. Other GPUs are given its shares of their own peaks:
# on an A100 the kernel alone reaches more, "50-73%" (arXiv 2307.08691, abstract), but with that no share of matrix
# products reproduces the A100's published runs as well as with the H100's shares.
_ATTENTION = {64: (141, 192, 232, 257, 273, 284), 128: (163, 221, 265, 294, 308, 328)}
_ATTENTION_PEAK = 989.4
# Bytes of memory traffic a number of the width, forward and backward, in a block: two norms with their sums 8 + 8 and
# 10 + 10 (8 + 8 without dropout), GELU with its bias 4 x 4 and 4 x 6, the biases of the other three products 10.
_ELEMENTWISE = 82
_LOGIT = 6  # bytes of traffic a logit: written, read, and its gradient written over it
UPDATE_BYTES = (
    54  # bytes a parameter of a rank's part: gradients flattened, widened, measured, clipped; Adam; copied back
)
_HOST_UPDATE = 34  # ... of CPU memory
_HOST_MEMORY = 486e9  # bytes/s of a node's CPU memory, STREAM on a node with eight H100 (aigatech/vpbenchmarking)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimiser step."""

    products: float
    attention: float
    elementwise: float
    update: float
    transfers: float  # between GPU and CPU memory
    network: float  # of all collectives
    exposed: float  # of network, what no computation hides

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.elementwise

    @property
    def total(self) -> float:
        return self.compute + self.update + self.transfers + self.exposed


def step_time(
    config: GPTConfig, layout: Layout, traffic: list[Collective], gpu: Gpu, nodes: int, correction: float = 1.0
) -> StepTime:
    """The time of a step; ``correction`` multiplies what is computed, as ``--measure`` found it."""
    tokens = layout.micro_batch * layout.accumulation * config.seq_len
    parts = {name: correction * seconds * tokens for name, seconds in token_time(config, gpu, layout.precision).items()}
    network, exposed = _communication(layout, traffic, gpu, nodes, sum(parts.values()))
    P = sum(p.numel for p in parameters(config))
    part = P / (1 if layout.stage == 0 else layout.world_size)
    update = part * UPDATE_BYTES / (gpu.bandwidth * MEMORY_SHARE)
    transfers = 0.0
    if layout.offload != "none":
        update = part * _HOST_UPDATE / (_HOST_MEMORY / max(1, layout.world_size // nodes))
        moved = part * 2 * (layout.accumulation + 1)  # every micro-step's gradients down, the parameters up
        if layout.offload == "all":
            moved += part * 2 * 2 * layout.accumulation  # parameters up for both passes
        transfers = moved / (gpu.host * LINK_SHARE)
    return StepTime(**parts, update=update, transfers=transfers, network=network, exposed=exposed)


def token_time(config: GPTConfig, gpu: Gpu, precision: str) -> dict[str, float]:
    """Seconds of computation a token, forward and backward with what is recomputed."""
    d, L, T = config.d_model, config.n_layer, config.seq_len
    peak = gpu.peak_in(precision)
    again = sum(recomputed(config, i) for i in range(L))
    block = 4 * d * d + 2 * d * config.d_ff
    products = 6 * (L * block + config.vocab_size * d) + 2 * again * block
    attention = 7 * L * T * d + 2 * again * T * d  # causal: 2 T d forward, 2.5 times that backward
    moved = _ELEMENTWISE * d * (L + again / 3) + _LOGIT * config.vocab_size
    scale = 1 if precision != "fp32" else 2
    return {
        "products": products / (peak * gpu.product_share),
        "attention": attention / (peak * attention_share(T, config.head_width)),
        "elementwise": scale * moved / (gpu.bandwidth * MEMORY_SHARE),
    }


def attention_share(seq_len: int, head_width: int) -> float:
    """Of the peak that attention reaches."""
    row = _ATTENTION[64 if head_width <= 64 else 128]
    at = min(max(math.log2(seq_len / 512), 0.0), len(row) - 1.0)
    low = min(int(at), len(row) - 2)
    return (row[low] + (at - low) * (row[low + 1] - row[low])) / _ATTENTION_PEAK


def _communication(
    layout: Layout, traffic: list[Collective], gpu: Gpu, nodes: int, compute: float
) -> tuple[float, float]:
    """Seconds of all collectives, and of those that nothing hides."""
    latency = LATENCY if nodes == 1 else NETWORK_LATENCY
    bandwidth = bus_bandwidth(gpu, nodes)
    seconds = {"micro_step": 0.0, "boundary": 0.0, "step": 0.0}
    for collective in traffic:
        sent = collective.sent(layout.world_size)
        seconds[collective.phase] += collective.calls * latency + sent / bandwidth
    beside = seconds["micro_step"] if layout.overlap else 0.0
    total = sum(seconds.values())
    # A backward pass is two thirds of the computation; stage 3 also gathers in the forward pass.
    hiding = compute if layout.stage == 3 else compute * 2 / 3
    return total, total - beside + max(0.0, beside - hiding)
