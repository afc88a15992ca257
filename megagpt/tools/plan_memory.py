"""Bytes on a GPU at the two moments that need most: the begin of a backward pass, and the update.

Activations are those that this model's operations keep on a GPU (``--kernels auto``): no dropout masks, no attention
scores, no logits but a chunk of them. Everything else follows DeepSpeed 0.19's own buffers. Not modelled: what torch
keeps for itself beyond ``margin``, and the memory of other programs.
"""

from dataclasses import dataclass

from megagpt.model.config import GPTConfig
from megagpt.tools.plan_gather import Gathers
from megagpt.tools.plan_model import groups, parameters
from megagpt.tools.plan_states import ELEMENT, FP32, flat_numel, model_states, most_touched
from megagpt.tools.plan_traffic import ENGINE_BUCKET, ZeroSizes

# The context of CUDA with its kernels takes 1.3 GB (Hugging Face's "Anatomy of Model's Memory", an A100); the rest is
# for NCCL's buffers and cuBLAS's workspaces. Assumed.
RUNTIME = 2_000_000_000
MARGIN = 0.05  # of everything else, for what torch's allocator cannot reuse; assumed
_CE_EXTRA, _CE_BUFFER = 512 * 10**6, 256 * 10**6  # of megagpt_kernels.linear_cross_entropy


@dataclass(frozen=True)
class Layout:
    """How a run is cut, as far as memory depends on it."""

    stage: int
    offload: str  # none, optimizer or all (parameters too), to CPU memory
    world_size: int
    precision: str  # fp32, bf16 or fp16
    micro_batch: int  # sequences
    accumulation: int
    sizes: ZeroSizes
    overlap: bool  # overlap_comm: two buckets


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by what they hold, and in the memory of the CPU for each of its GPUs."""

    parameters: float
    gradients: float
    optimizer: float  # master weights and moments
    activations: float
    working: float  # gradients on their way, logits of a chunk, gathered parameters
    buffers: float  # buckets of collectives
    update: float  # beside parameters, gradients and optimizer, during the update
    runtime: float
    margin: float
    host: float  # CPU memory

    @property
    def peak(self) -> float:
        """Bytes on the GPU when it holds most."""
        states = self.parameters + self.gradients + self.optimizer
        return states + max(self.activations + self.working + self.buffers, self.update) + self.runtime + self.margin


def activations(config: GPTConfig, micro_batch: int, precision: str, seq_len: int | None = None) -> int:
    """What the forward pass of ``micro_batch`` sequences keeps for the backward pass, without the loss's part.

    A token keeps in a block: the two residual sums, the two normed ones, queries, keys and values, attention's output,
    the hidden layer before and after GELU (8 d + 2 f numbers), attention's logarithms of sums and the norms' statistics
    in float32, and with dropout on attention two keys a head. A block that is recomputed keeps its inputs: the branch
    and the residual it is to be added to (pre-norm), or one tensor (post-norm).
    """
    e, n = ELEMENT[precision], micro_batch * (seq_len or config.seq_len)
    stream = n * config.d_model * e
    kept = sum(n * _block(config, e) for i in range(config.n_layer) if not recomputed(config, i))
    for i in filter(lambda i: recomputed(config, i), range(config.n_layer)):
        if config.norm == "post" or i == 0:
            kept += stream
        else:
            # The residual is the last block's sum, which that block keeps itself unless it is recomputed.
            kept += 2 * stream if recomputed(config, i - 1) else stream
    last_norm = n * (config.d_model * e + 2 * FP32) if config.norm == "pre" else 0
    return kept + last_norm


def recomputed(config: GPTConfig, block: int) -> bool:
    """Whether a block's activations are computed anew in the backward pass."""
    every = config.activation_checkpointing
    return bool(every) and block % every == 0


def _block(config: GPTConfig, e: int) -> int:
    """Bytes that a token keeps in one block."""
    heads = FP32 * config.n_head * (3 if config.attn_dropout else 1)
    return (8 * config.d_model + 2 * config.d_ff) * e + heads + 4 * FP32


def loss_kept(config: GPTConfig, micro_batch: int, precision: str) -> int:
    """What the loss keeps: its gradients, computed with it; that of the table in float32."""
    n = micro_batch * config.seq_len
    return n * config.d_model * ELEMENT[precision] + config.vocab_size * config.d_model * FP32


def memory(
    config: GPTConfig,
    layout: Layout,
    gathered: Gathers | None,
    *,
    runtime: float = RUNTIME,
    margin: float = MARGIN,
) -> Memory:
    """The memory of one rank; of stage 2 the rank that has most. ``gathered`` is for stage 3."""
    e = ELEMENT[layout.precision]
    states = model_states(config, layout.stage, layout.world_size, layout.precision, accumulation=layout.accumulation)
    gradients = _gradients(config, layout, states.gradients)
    optimizer = states.master + states.moments
    on_gpu = {"parameters": states.parameters, "gradients": gradients, "optimizer": optimizer}
    host = 0.0
    if layout.offload != "none":
        # Beside them a float32 gradient, and with stage 2 a copy of the new parameters on their way up.
        part = states.master // FP32
        host = optimizer + part * (FP32 + e) + states.gradients * (layout.stage == 3 or layout.accumulation > 1)
        largest = max(p.numel for p in parameters(config)) * e
        on_gpu.update(optimizer=0, gradients=largest if layout.stage < 3 else 0)
        if layout.offload == "all":
            host += states.parameters
            on_gpu["parameters"] = 0
    kept = activations(config, layout.micro_batch, layout.precision)
    working = _working(config, layout) + (gathered.most_live * e if gathered else 0)
    update = 0 if layout.offload != "none" else _update(config, layout)
    buffers = _buffers(config, layout)
    base = sum(on_gpu.values()) + max(kept + working + buffers, update)
    return Memory(
        **on_gpu,
        activations=kept,
        working=working,
        buffers=buffers,
        update=update,
        runtime=runtime,
        margin=margin * base,
        host=host,
    )


def _gradients(config: GPTConfig, layout: Layout, whole: int) -> float:
    """Gradients that stay while a backward pass begins."""
    e = ELEMENT[layout.precision]
    if layout.stage == 2:
        copies = 1 if layout.accumulation == 1 else 2
        return sum(most_touched(group, layout.world_size) for group in groups(config)) * e * copies
    if layout.stage < 2 and layout.accumulation == 1:
        # They grow while activations shrink; at the begin there are none, at the end no activations.
        return max(0, whole - activations(config, layout.micro_batch, layout.precision))
    return whole


def _working(config: GPTConfig, layout: Layout) -> float:
    """What a backward pass needs beside what was kept: the most of three moments."""
    e = ELEMENT[layout.precision]
    n = layout.micro_batch * config.seq_len
    table = config.vocab_size * config.d_model
    loss = loss_kept(config, layout.micro_batch, layout.precision)
    chunk = max(_CE_BUFFER, _CE_EXTRA - loss)
    logits = loss + chunk
    its_backward = loss + table * e + n * config.d_model * e
    # The gradients of both sides of GELU, of the stream and the branch, and those of the block's own parameters.
    block = n * (2 * config.d_ff + 3 * config.d_model) * e
    block += (4 * config.d_model**2 + 2 * config.d_model * config.d_ff) * e * (layout.stage > 1)
    if config.activation_checkpointing:
        block += n * _block(config, e)
    return max(logits, its_backward, table * e + block)


def _buffers(config: GPTConfig, layout: Layout) -> float:
    """Buckets of gradients, the copy that is summed, and what a parameter larger than a bucket takes."""
    e = ELEMENT[layout.precision]
    if layout.world_size == 1 or layout.stage == 0:
        return 0
    bucket = layout.sizes.reduce_bucket * e
    if layout.stage == 3:
        return bucket + max(p.numel for p in parameters(config)) * e
    P = sum(p.numel for p in parameters(config))
    return bucket * (2 if layout.overlap else 1) + min(bucket, P * e)


def _update(config: GPTConfig, layout: Layout) -> float:
    """Beside the states: gradients in float32, and copies made on the way to them."""
    e = ELEMENT[layout.precision]
    P = sum(p.numel for p in parameters(config))
    if layout.stage == 0:
        summed = min(P, ENGINE_BUCKET) * e if layout.world_size > 1 else 0
        return max(summed, 0 if layout.precision == "fp32" else 2 * P * FP32)
    if layout.stage < 3:
        return max(flat_numel(group, layout.world_size) for group in groups(config)) // layout.world_size * (e + FP32)
    part = -(-P // layout.world_size)
    return min(part, 10**9) * (e + FP32)
