"""The kernels of ``add_layer_norm``: N rows, D width.

A row lies in the registers of one or several warps, in chunks whose width is a power of two although D need not be
one: 768 are three chunks of 256 in one warp, each loaded with 16 bytes a thread.
"""

import triton
import triton.language as tl

from megagpt_kernels import masks


@triton.jit
def _append(pieces, piece):
    return pieces + (piece,)  # noqa: RUF005  Triton does not unpack tuples


@triton.jit
def _load(ptr, columns, D: tl.constexpr):
    """Elements of a vector (D,); zero beyond its end."""
    return tl.load(ptr + columns, mask=columns < D, other=0)


@triton.jit
def _load_all(ptr, columns, D: tl.constexpr, CHUNK: tl.constexpr):
    """A vector (D,), in pieces of the shape of ``columns``, the first chunk's column numbers."""
    pieces = ()
    for begin in tl.static_range(0, D, CHUNK):
        pieces = _append(pieces, _load(ptr, begin + columns, D))
    return pieces


@triton.jit
def _column_keys(seed, n_rows, columns, D: tl.constexpr, CHUNK: tl.constexpr):
    """Keys of all columns, in pieces like those of :func:`_load_all`."""
    pieces = ()
    for begin in tl.static_range(0, D, CHUNK):
        pieces = _append(pieces, masks.keys(seed, n_rows + begin + columns))
    return pieces


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr,  # (N, D); (N, D) or None
    weight_ptr, bias_ptr,  # (D,)
    seed_ptr,  # () or None without dropout
    normed_ptr, sum_ptr,  # (N, D); (N, D) or None where it would be x
    mean_ptr, rstd_ptr,  # (N,)
    n_rows, eps, threshold, scale,
    D: tl.constexpr, CHUNK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th row; with KEEP it reads weight and bias only once."""
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    columns = tl.arange(0, CHUNK)
    if KEEP:
        weight = _load_all(weight_ptr, columns, D, CHUNK)
        bias = _load_all(bias_ptr, columns, D, CHUNK)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        column_keys = _column_keys(seed, n_rows, columns, D, CHUNK)
    # With two stages the next row is on its way into shared memory while this one is worked on.
    for row in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=2 if KEEP else 1):
        begin = tl.cast(row, tl.int64) * D
        if seed_ptr is not None:
            row_key = masks.keys(seed, row)
        pieces = ()
        total = tl.zeros([CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            inside = c * CHUNK + columns < D
            offsets = begin + c * CHUNK + columns
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            if seed_ptr is not None:
                x *= tl.where(masks.keep(row_key, column_keys[c], threshold), scale, 0.0)
            if residual_ptr is not None:
                x += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            if sum_ptr is not None:
                rounded = x.to(sum_ptr.dtype.element_ty)
                tl.store(sum_ptr + offsets, rounded, mask=inside)
                x = rounded.to(tl.float32)  # as the backward pass will see it
            pieces = _append(pieces, x)
            total += x
        mean = tl.sum(total) / D
        total = tl.zeros([CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            centred = tl.where(c * CHUNK + columns < D, pieces[c] - mean, 0.0)
            total += centred * centred
        rstd = tl.rsqrt(tl.sum(total) / D + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
        if not KEEP:
            weight = _load_all(weight_ptr, columns, D, CHUNK)
            bias = _load_all(bias_ptr, columns, D, CHUNK)
        for c in tl.static_range(CHUNKS):
            normed = (pieces[c] - mean) * rstd * weight[c].to(tl.float32) + bias[c].to(tl.float32)
            tl.store(normed_ptr + begin + c * CHUNK + columns, normed, mask=c * CHUNK + columns < D)


@triton.jit
def backward_kernel(
    d_normed_ptr, d_sum_ptr,  # (N, D); (N, D) or None
    sum_ptr,  # (N, D)
    weight_ptr,  # (D,)
    mean_ptr, rstd_ptr,  # (N,)
    seed_ptr, column_keys_ptr,  # () or None without dropout; (D,), used only without KEEP
    dx_ptr, d_residual_ptr,  # (N, D); (N, D) or None where it would be dx, or nobody needs it
    partials_ptr,  # (num_programs, 2, D): of d_weight and of d_bias
    n_rows, threshold, scale,
    D: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """A program takes every num_programs-th group of ROWS rows.

    With KEEP a row stays in registers between its two uses. Without, it is read again, from the cache that it has just
    come through, and so are weight and column keys: registers hold little more than the sums of the weights' gradients.
    """
    CHUNKS: tl.constexpr = (D + CHUNK - 1) // CHUNK
    columns = tl.arange(0, CHUNK)[None, :]
    if KEEP:
        weight = _load_all(weight_ptr, columns, D, CHUNK)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        if KEEP:
            column_keys = _column_keys(seed, n_rows, columns, D, CHUNK)
    d_weight = ()
    d_bias = ()
    for _ in tl.static_range(CHUNKS):
        d_weight = _append(d_weight, tl.zeros([ROWS, CHUNK], tl.float32))
        d_bias = _append(d_bias, tl.zeros([ROWS, CHUNK], tl.float32))
    # With two stages the next row is on its way while this one is worked on. Several rows, in warps of their own, hide
    # each other's waiting.
    STAGES: tl.constexpr = 2 if KEEP and ROWS == 1 else 1
    for first in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
        begins = rows.to(tl.int64) * D
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        x_hats = ()
        slopes = ()  # d_normed * weight
        next_d_weight = ()
        next_d_bias = ()
        along = tl.zeros([ROWS, CHUNK], tl.float32)
        level = tl.zeros([ROWS, CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            inside = (rows < n_rows) & (c * CHUNK + columns < D)
            offsets = begins + c * CHUNK + columns
            x_hat = (tl.load(sum_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            dy = tl.load(d_normed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            next_d_weight = _append(next_d_weight, d_weight[c] + dy * x_hat)
            next_d_bias = _append(next_d_bias, d_bias[c] + dy)
            if KEEP:
                slope = dy * weight[c].to(tl.float32)
                x_hats = _append(x_hats, x_hat)
                slopes = _append(slopes, slope)
            else:
                slope = dy * _load(weight_ptr, c * CHUNK + columns, D).to(tl.float32)
            along += slope * x_hat
            level += slope
        d_weight = next_d_weight
        d_bias = next_d_bias
        along = tl.sum(along, axis=1)[:, None] / D
        level = tl.sum(level, axis=1)[:, None] / D
        if seed_ptr is not None:
            row_keys = masks.keys(seed, rows)
        for c in tl.static_range(CHUNKS):
            inside = (rows < n_rows) & (c * CHUNK + columns < D)
            offsets = begins + c * CHUNK + columns
            if KEEP:
                dx = rstd * (slopes[c] - level - x_hats[c] * along)
            else:
                x_hat = (tl.load(sum_ptr + offsets, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
                dy = tl.load(d_normed_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
                slope = dy * _load(weight_ptr, c * CHUNK + columns, D).to(tl.float32)
                dx = rstd * (slope - level - x_hat * along)
            if d_sum_ptr is not None:
                dx += tl.load(d_sum_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            if d_residual_ptr is not None:
                tl.store(d_residual_ptr + offsets, dx, mask=inside)
            if seed_ptr is not None:
                keys = column_keys[c] if KEEP else _load(column_keys_ptr, c * CHUNK + columns, D)
                dx *= tl.where(masks.keep(row_keys, keys, threshold), scale, 0.0)
            tl.store(dx_ptr + offsets, dx, mask=inside)
    for c in tl.static_range(CHUNKS):
        begin = tl.program_id(0) * 2 * D + c * CHUNK
        inside = c * CHUNK + columns < D
        tl.store(partials_ptr + begin + columns, tl.sum(d_weight[c], axis=0)[None, :], mask=inside)
        tl.store(partials_ptr + begin + D + columns, tl.sum(d_bias[c], axis=0)[None, :], mask=inside)
