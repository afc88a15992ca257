"""Kernels compiled for GPUs that are not there: what they take of a multiprocessor, and that they use its tensor cores.

In a process of its own: in this one, kernels are interpreted.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt_kernels import runtime

ROOT = Path(__file__).parent.parent
# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": shared memory of a block.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MOST_SPILLED = 64  # bytes a thread, in backward kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Every kernel at the shapes of the smallest and of the largest model, for each compute capability."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "kernels/aot.py", "--quick", "--json", str(folder / "kernels.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return json.loads((folder / "kernels.json").read_text())


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    return importlib.import_module("aot")


@pytest.mark.timeout(900)  # for the compiles, which the first test waits for: a minute on an idle core
def test_every_operation_compiles_for_every_compute_capability(compiled):
    operations = {"attention", "bias_gelu", "add_layer_norm", "dropout", "linear_cross_entropy"}
    assert {(record["operation"], record["arch"]) for record in compiled} == {
        (operation, arch) for operation in operations for arch in SHARED_LIMIT
    }


def test_forward_kernels_spill_no_register_and_backward_kernels_few(compiled):
    assert any("backward" in record["name"] for record in compiled)
    for record in compiled:
        parts = ("backward", "delta", "dkdv", "dq", "convert", "cross_entropy")
        backward = any(part in record["name"] for part in parts)
        assert record["spilled"] <= (MOST_SPILLED if backward else 0), record
        assert 0 < record["registers"] <= 255, record


def test_a_block_takes_no_more_shared_memory_than_there_is(compiled):
    assert any(record["shared"] for record in compiled)
    for record in compiled:
        assert record["shared"] <= SHARED_LIMIT[record["arch"]], record


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "MMA")])
def test_attention_multiplies_with_the_tensor_cores(compiled, arch, instruction):
    kernels = [record for record in compiled if record["arch"] == arch and record["products"]]
    assert {"forward" in record["name"] for record in kernels} == {True, False}
    for record in kernels:
        assert any(instruction in name for name in record["tensor_core"]), record


@pytest.mark.parametrize("operation", ["bias_gelu", "add_layer_norm", "dropout"])
def test_what_memory_bounds_loads_16_bytes_a_thread(compiled, operation):
    for record in compiled:
        if record["operation"] == operation and "sum" not in record["name"]:
            assert record["wide_loads"] > 0, record


# -- the table of the documents


def documented() -> set[tuple[str, str, str]]:
    """(operation, kernel, case) of every row."""
    text = (ROOT / "docs" / "kernels.md").read_text()
    rows = text.partition("<!-- resources: begin -->")[2].partition("<!-- resources: end -->")[0].splitlines()[3:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    found = set()
    for operation, kernel, cases, *_ in cells:
        for group in cases.split("; "):
            names, forms = (part.split(" / ") for part in group.split(": "))
            found |= {(operation, kernel.strip("`"), f"{name}, {form}") for name in names for form in forms}
    return found


def test_the_table_of_the_documents_is_of_the_kernels_that_there_are(aot):
    """Where this fails: python kernels/aot.py --table docs/kernels.md"""
    launched = set()
    for operation, cases in aot.OPERATIONS.items():
        for case in cases(False):

            def note(kernel, args, options, operation=operation, case=case) -> None:
                launched.add((operation, kernel.__name__.strip("_"), case.label))

            with runtime.recording(note, (9, 0)):
                case.work()
    assert documented() == launched


# -- the command itself


GOOD = {
    "operation": "attention",
    "case": "gpt1, bf16",
    "dtype": "bf16",
    "name": "_forward_kernel",
    "nth": 1,
    "arch": 90,
    "num_warps": 4,
    "registers": 128,
    "spilled": 0,
    "shared": 57 * 1024,
    "products": True,
    "tensor_core": {"HGMMA": 8},
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"arch": 80, "shared": 164 * 1024}, "shared memory"),
        ({"spilled": 8}, "spills 8 bytes a thread, of 0"),
        ({"spilled": 8, "name": "_dkdv_kernel"}, None),
        ({"spilled": 72, "name": "_dkdv_kernel"}, "spills 72 bytes a thread, of 64"),
        ({"tensor_core": {}}, "without tensor cores"),
        ({"tensor_core": {"HMMA": 8}}, "without wgmma"),
        ({"tensor_core": {"HMMA": 8}, "arch": 80}, None),
        ({"tensor_core": {}, "products": False}, None),
    ],
    ids=str,
)
def test_a_kernel_that_takes_too_much_is_reported(aot, change, complaint):
    found = aot.faults(GOOD | change)
    assert len(found) == (complaint is not None)
    assert all(complaint in line for line in found)


def test_the_table_has_a_row_for_each_kernel_and_a_column_for_each_capability(aot):
    records = [GOOD, GOOD | {"arch": 80, "tensor_core": {"HMMA": 64}}, GOOD | {"case": "1.3b, bf16", "registers": 255}]
    header, _, *rows = aot.table(records).splitlines()
    assert header == "| operation | kernel | for | sm_80 | sm_90 |"
    assert rows == [
        "| attention | `forward_kernel` | gpt1: bf16 | 4 warps, 128 registers, 57.0 KB, 64 HMMA "
        "| 4 warps, 128 registers, 57.0 KB, 8 HGMMA |",
        "| attention | `forward_kernel` | 1.3b: bf16 |  | 4 warps, 255 registers, 57.0 KB, 8 HGMMA |",
    ]


def test_the_table_is_rewritten_between_its_marker_lines(aot, tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n{aot.BEGIN}\nold\n{aot.END}\nafter\n")
    aot.rewrite(document, "new")
    assert document.read_text() == f"before\n{aot.BEGIN}\nnew\n{aot.END}\nafter\n"
    document.write_text("no marker lines\n")
    with pytest.raises(SystemExit, match="has no lines"):
        aot.rewrite(document, "new")
