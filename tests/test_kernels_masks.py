"""Dropout masks of the kernels: the keys and the decision of ``megagpt.ops.masks.HashedMasks``, bit by bit."""

import os

import pytest
import torch
import triton
import triton.language as tl

from megagpt.ops.masks import HashedMasks
from megagpt_kernels import masks, runtime

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@triton.jit
def _mask_kernel(rows_ptr, columns_ptr, out_ptr, n_rows, n_columns, threshold, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_keys = tl.load(rows_ptr + r, mask=r < n_rows, other=0)
    column_keys = tl.load(columns_ptr + c, mask=c < n_columns, other=0)
    kept = masks.keep(row_keys[:, None], column_keys[None, :], threshold)  # [BLOCK, BLOCK]
    inside = (r < n_rows)[:, None] & (c < n_columns)[None, :]
    tl.store(out_ptr + r[:, None] * n_columns + c[None, :], kept.to(tl.int8), mask=inside)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (7, 64), (65, 33)], ids=str)
def test_kernels_keep_exactly_what_the_definition_keeps(shape, p, device):
    seed = torch.tensor(-(1 << 62) + 12345, device=device)
    definition = HashedMasks(seed, p, (1, *shape))
    everything = slice(None)
    row_keys, column_keys = masks.dropout_keys(seed, *shape)
    threshold, scale = masks.threshold_and_scale(p)
    kept = torch.empty(shape, dtype=torch.int8, device=device)
    grid = tuple(triton.cdiv(n, 32) for n in shape)
    runtime.launch(_mask_kernel, grid, row_keys, column_keys, kept, *shape, threshold, BLOCK=32)
    assert torch.equal(kept * scale, definition(everything, everything, everything)[0].double())


def test_keys_of_more_rows_than_a_block_are_those_of_the_definition(device):
    seed = torch.tensor(3, device=device)
    definition = HashedMasks(seed, 0.5, (1, 3000, 701))
    row_keys, column_keys = masks.dropout_keys(seed, 3000, 701)
    assert torch.equal(row_keys, definition.rows.view(-1))
    assert torch.equal(column_keys, definition.columns.view(-1))


def test_defining_kernels_leaves_the_environment_as_it_was(device):
    assert (device == "cpu") == runtime.INTERPRETED
    assert device == "cuda" or os.environ.get("TRITON_INTERPRET") != "1"
