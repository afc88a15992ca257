"""The table of attention's tiles, how a GPU finds its row, and how the tuner prunes and writes rows."""

import importlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from megagpt_kernels import attention_tiles
from megagpt_kernels.attention_parts import WIDTHS
from megagpt_kernels.attention_table import TABLE
from megagpt_kernels.attention_tiles import COLUMNS, KERNELS, Tile, choose, column

ROOT = Path(__file__).parent.parent
KEY = {"K": 64, "T": 1024, "dtype": torch.bfloat16, "dropout": False, "capability": (9, 0)}


@pytest.fixture
def tune(monkeypatch):
    for folder in ("kernels", "kernels/benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module("tune")


def uninterpreted(*command: str) -> subprocess.CompletedProcess:
    """Python in a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


# -- the table


def test_the_table_has_a_row_for_whatever_can_be_asked():
    assert set(TABLE) == set(product(KERNELS, WIDTHS, (2, 4), (False, True), COLUMNS))
    for rows in TABLE.values():
        lengths = [longest for longest, _ in rows]
        assert lengths[-1] is None
        assert lengths[:-1] == sorted(lengths[:-1])


SERVES = {80: "8.0 8.6 8.7 8.9 12.0 12.1", 90: "9.0", 100: "10.0 10.3 11.0"}


@pytest.mark.parametrize(("row", "name"), [(row, name) for row, names in SERVES.items() for name in names.split()])
def test_a_gpu_takes_the_row_of_one_that_multiplies_as_it_does(row, name):
    assert column(tuple(map(int, name.split(".")))) == row


def test_the_tile_is_that_of_the_first_length_that_is_long_enough(monkeypatch):
    rows = ((512, (16, 32, 1, 1)), (2048, (32, 32, 2, 2)), (None, (64, 32, 4, 3)))
    monkeypatch.setitem(TABLE, ("dq", 64, 2, False, 90), rows)
    found = {T: choose("dq", **KEY | {"T": T}).queries for T in (1, 512, 513, 2048, 2049, 1 << 20)}
    assert found == {1: 16, 512: 16, 513: 32, 2048: 32, 2049: 64, 1 << 20: 64}
    assert choose("dq", **KEY | {"T": 1}) == Tile(queries=16, keys=32, warps=1, stages=1)


def test_a_tile_can_be_forced_for_one_kernel_for_a_while():
    usual, tile = choose("forward", **KEY), Tile(16, 16, 1, 1)
    with attention_tiles.forced({"forward": tile}):
        assert choose("forward", **KEY) == tile
        assert choose("dq", **KEY) != tile
    assert choose("forward", **KEY) == usual


# -- the tuner

PRUNE = """
import json, sys
sys.path.insert(0, "kernels")
import tune
from tune import Key, Tile
tune.candidates = lambda key: [Tile(*tile) for tile in json.loads(sys.argv[1])]
key = Key("forward", 128, 2, False, 90)
print(json.dumps([tune.astuple(tile) for tile in tune.fitting(key)]))
with tune.attention_tiles.forced({"forward": Tile(64, 64, 4, 2, True)}):
    kernels = tune.compile_launches(tune.work(key, 512, "meta"), 90, only="_attention_forward_kernel")
print([kernel.block_loads for kernel in kernels])
"""


def test_what_spills_or_takes_too_much_or_misses_the_tensor_cores_is_dropped():
    spills, too_much, no_wgmma = (128, 128, 4, 2, False), (128, 128, 8, 4, False), (32, 64, 4, 2, False)
    fit = [(128, 64, 8, 2, False), (64, 64, 4, 2, True)]
    tiles = [spills, fit[0], too_much, no_wgmma, fit[1]]
    done = uninterpreted("-c", PRUNE, json.dumps(tiles))
    assert done.returncode == 0, done.stderr
    fitting, block_loads = map(json.loads, done.stdout.splitlines())
    assert [tuple(tile) for tile in fitting] == fit
    assert block_loads[0] > 0


def test_without_a_gpu_the_first_tile_that_fits_is_written_and_it_says_that_none_was_timed(tune, tmp_path):
    path = tmp_path / "table.py"
    path.write_text("")
    done = uninterpreted(
        *("kernels/tune.py", "--arch", "80", "--kernel", "forward", "--width", "32", "--bytes", "2"),
        *("--output", str(path)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no GPU here: tiles are pruned")
    written = {}
    exec(path.read_text(), written)
    tuned = {("forward", 32, 2, dropout, 80) for dropout in (False, True)}
    assert {key for key, row in written["TABLE"].items() if row != TABLE[key]} <= tuned  # the others stay
    for key in tuned:
        ((longest, tile),) = written["TABLE"][key]
        assert longest is None
        assert Tile(*tile) in tune.candidates(tune.Key(*key))


def test_candidates_leave_room_for_what_they_load(tune):
    key = tune.Key("forward", 256, 4, False, 80)
    tiles = list(tune.candidates(key))
    assert tiles
    assert max(2 * tile.stages * tile.keys * 256 * 4 for tile in tiles) <= 99 * 1024


def test_descriptors_are_tried_last_and_where_they_can_load(tune):
    described = [tile.descriptors for tile in tune.candidates(tune.Key("forward", 64, 2, False, 90))]
    assert set(described) == {False, True}
    assert described == sorted(described)
    for other in (("forward", 64, 2, False, 80), ("forward", 80, 2, False, 90), ("dkdv", 64, 2, False, 90)):
        assert not any(tile.descriptors for tile in tune.candidates(tune.Key(*other)))


def test_a_row_is_of_the_fastest_tiles_and_equal_lengths_are_one(tune, monkeypatch):
    tiles = {512: Tile(1, 1, 1, 1), 1024: Tile(1, 1, 1, 1), 2048: Tile(2, 2, 2, 2), 8192: Tile(3, 3, 3, 3)}
    monkeypatch.setattr(tune, "fitting", lambda key: iter(tiles.values()))
    monkeypatch.setattr(tune, "fastest", lambda key, found, T, clock: tiles[T])  # what only a GPU can tell
    found = tune.row(tune.Key("forward", 64, 2, False, 90), clock=object())
    assert [(longest, Tile(*tile)) for longest, tile in found] == [
        (1024, tiles[1024]),
        (2048, tiles[2048]),
        (None, tiles[8192]),
    ]
    monkeypatch.setattr(tune, "fitting", lambda key: iter(()))
    with pytest.raises(SystemExit, match="no tile fits"):
        tune.row(tune.Key("forward", 64, 2, False, 90), clock=None)
