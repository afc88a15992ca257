"""Choose the tiles of attention's kernels and write the table that megagpt_kernels/attention_tiles.py reads.

    python kernels/tune.py [--arch 90 ...] [--kernel forward ...] [--width 64 ...] [--bytes 2 4] [--minutes 20]

A row is for a kernel, a head width, the bytes of an element, with or without dropout, and a compute capability. Tiles
are compiled for it, and those dropped that spill registers, miss the tensor cores or take more shared memory than a
block has. On a GPU the rest are timed at four lengths and the fastest wins. Elsewhere the first of the rest is taken,
in an order of preference, which says nothing about time. Rows of other keys stay as they are.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks")]

from gpu_clock import Clock  # noqa: E402

from megagpt_kernels import attention_tiles  # noqa: E402
from megagpt_kernels.attention_backward import backward  # noqa: E402
from megagpt_kernels.attention_forward import Setting, forward  # noqa: E402
from megagpt_kernels.attention_parts import WIDTHS  # noqa: E402
from megagpt_kernels.attention_table import TABLE  # noqa: E402
from megagpt_kernels.attention_tiles import COLUMNS, KERNELS, Tile  # noqa: E402
from offline import SHARED_LIMIT, Kernel, compile_launches  # noqa: E402

OUTPUT = HERE / "megagpt_kernels" / "attention_table.py"
LENGTHS = (512, 1024, 2048, None)  # up to which a tile serves; None, for whatever is longer, is timed at 8192
# Bytes of shared memory that a tile may take. Rows for 8.0 serve 8.6, 8.9 and 12 too, which have less.
ROOM = {80: SHARED_LIMIT[86], 90: SHARED_LIMIT[90], 100: SHARED_LIMIT[100]}
_TOKENS, _MODEL_WIDTH = 2**14, 2048  # as the FlashAttention-3 paper times

# Rows of accumulators, what passes by them at once, warps. On Hopper a product is of 64 rows by 4 warps. Narrow heads:
# small blocks, several on a multiprocessor, hide each other's exponentials. Wide ones: more products for each load.
_NARROW = ((64, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8), (128, 64, 4))
_WIDE = ((128, 128, 8), (128, 64, 8), (64, 64, 4), (128, 32, 8))
_BACKWARD = ((128, 64, 8), (64, 64, 4), (128, 32, 8), (64, 64, 8))
_WIDEST = ((32, 64, 8),)  # gradients of heads of 256 spill with all others
_FLOAT32 = ((64, 32, 4), (128, 32, 8), (64, 64, 4), (64, 64, 8))  # three products for one, of twice the bytes
_SMALLEST = ((32, 32, 4), (32, 16, 4), (16, 16, 4))
_SMALL = ((64, 32, 8), (64, 32, 4), (64, 16, 4), *_SMALLEST)


class Key(NamedTuple):
    """What a row of the table is for."""

    kernel: str
    K: int
    itemsize: int
    dropout: bool
    arch: int


def candidates(key: Key) -> Iterator[Tile]:
    """Tiles by preference, without those whose loads alone take more shared memory than there is.

    Those with descriptors come last: only times on a GPU can speak for them.
    """
    if key.itemsize == 4:
        shapes = _FLOAT32 if key.K < 128 else ()
    elif key.kernel == "forward":
        shapes = _NARROW if key.K <= 64 else _WIDE
    else:
        shapes = _BACKWARD
    shapes += _SMALL if shapes else _SMALLEST
    if key.K == 256 and key.itemsize == 2:
        shapes += _WIDEST
    pipelined = [*product(shapes, (3, 2) if key.itemsize == 2 else (2,))]
    described = pipelined if key.kernel == "forward" and key.arch >= 90 and WIDTHS[key.K][1] == 0 else []
    forms = [*product(pipelined, [False]), *product(product(shapes, (1,)), [False]), *product(described, [True])]
    for ((rows, columns, warps), stages), descriptors in forms:
        if 2 * stages * columns * key.K * key.itemsize <= ROOM[key.arch]:
            queries, keys = (columns, rows) if key.kernel.startswith("dkdv") else (rows, columns)
            yield Tile(queries, keys, warps, stages, descriptors)


def work(key: Key, T: int, device: str) -> Callable[[], None]:
    """Runs the pass that has the kernel, for heads that together are as wide as a model."""
    B, H = max(1, _TOKENS // T), _MODEL_WIDTH // key.K
    dtype = {2: torch.bfloat16, 4: torch.float32}[key.itemsize]
    qkv = torch.randn(B, T, 3, H, key.K, device=device).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    dq, dk, dv = torch.empty_like(qkv).permute(2, 0, 3, 1, 4).unbind()
    dout = torch.randn(B, T, H, key.K, device=device).to(dtype)
    seed = torch.zeros((), dtype=torch.int64, device=device) if key.dropout else None
    setting = Setting(True, 0.1 * key.dropout, key.K**-0.5, key.kernel in ("dkdv", "dq"))
    saved = []

    def run() -> None:
        if key.kernel == "forward" or not saved:
            saved[:] = forward(q, k, v, seed, None, setting)
        if key.kernel != "forward":
            backward(dout, q, k, v, *saved, setting, dq, dk, dv)

    return run


def fitting(key: Key) -> Iterator[Tile]:
    """The candidates that a multiprocessor has room for and that spill nothing.

    If all spill, the one that does least: for heads of 256 they can, whatever the tile.
    """
    spilling = []
    for tile in candidates(key):
        spilled = _spilled(key, tile)
        if spilled == 0:
            spilling = None
            yield tile
        elif spilled is not None and spilling is not None:
            spilling.append((spilled, tile))
    if spilling:
        yield min(spilling, key=lambda pair: pair[0])[1]


def _spilled(key: Key, tile: Tile) -> int | None:
    """Bytes a thread that the kernel spills; None where it cannot serve."""
    name = {"forward": "_attention_forward_kernel", "dq": "_dq_kernel"}.get(key.kernel, "_dkdv_kernel")
    with attention_tiles.forced(dict.fromkeys(KERNELS, tile)):  # the other kernels may have no row yet
        (kernel,) = compile_launches(work(key, 512, "meta"), key.arch, only=name)
    fits = kernel.shared <= ROOM[key.arch] and _uses_tensor_cores(key, kernel)
    return kernel.spilled if fits else None


def _uses_tensor_cores(key: Key, kernel: Kernel) -> bool:
    name = "HGMMA" if key.itemsize == 2 and key.arch == 90 else "MMA"
    return any(name in found for found in kernel.tensor_core)


def fastest(key: Key, tiles: list[Tile], T: int, clock: Clock) -> Tile:
    """The one of ``tiles`` whose pass takes least."""
    run = work(key, T, "cuda")
    times = {}
    for tile in tiles:
        with attention_tiles.forced({key.kernel: tile}):
            times[tile] = statistics.median(clock.samples(run))
    return min(times, key=times.get)


def row(key: Key, clock: Clock | None) -> tuple:
    """((T up to, tile), ...) for one key: timed where there is a clock."""
    tiles = list(fitting(key)) if clock else [next(fitting(key), None)]
    if not tiles or tiles[0] is None:
        raise SystemExit(f"error: no tile fits {key}; add a smaller one to candidates()")
    if clock is None:
        return ((None, astuple(tiles[0])),)
    found = [(longest, astuple(fastest(key, tiles, longest or 8192, clock))) for longest in LENGTHS]
    return tuple(each for each, after in zip(found, [*found[1:], (0, None)], strict=True) if each[1] != after[1])


def text(table: dict) -> str:
    """The module that holds the table."""
    rows = "\n".join(f"    {key}: {table[key]},".replace("'", '"') for key in sorted(table))
    return f'''"""Tiles of attention's kernels: written by kernels/tune.py, read by attention_tiles.py."""
# ruff: noqa: E501, RUF100
# fmt: off

# (kernel, head width, bytes of an element, dropout, compute capability * 10):
#     ((longest T, or None for any, (queries, keys, warps, stages, descriptors)), ...)
TABLE = {{
{rows}
}}
'''


def main(argv: list[str] | None = None) -> int:
    here = attention_tiles.column(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, choices=COLUMNS, default=[here] if here else COLUMNS)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--width", nargs="+", type=int, choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--bytes", nargs="+", type=int, choices=(2, 4), default=(2, 4), help="of an element")
    parser.add_argument("--missing", action="store_true", help="only rows that the table does not have")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after this time")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    if here is None:
        print("no GPU here: tiles are pruned by what they take of a multiprocessor; none is timed")
    table = dict(TABLE)
    begun = time.monotonic()
    for key in map(Key._make, product(args.kernel, args.width, args.bytes, (False, True), args.arch)):
        if args.missing and tuple(key) in TABLE:
            continue
        if time.monotonic() - begun > 60 * args.minutes:
            print(f"no time was left for {key} and what comes after it")
            break
        table[tuple(key)] = row(key, Clock(torch.device("cuda")) if key.arch == here else None)
        print(f"{', '.join(map(str, key))}: {table[tuple(key)]}", flush=True)
        args.output.write_text(text(table), encoding="utf-8")  # at once: what is stopped half-way has done half
    return 0


if __name__ == "__main__":
    sys.exit(main())
