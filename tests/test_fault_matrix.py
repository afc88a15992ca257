"""A few cases of tests/fault_matrix.py, so that it stays as it has to be."""

import itertools

from fault_numbers import numbers
from fault_writes import TOLD, writes


def test_a_way_of_not_being_finite_is_seen_through(tmp_path):
    found = list(numbers(tmp_path, ["zero2_bf16"], only="NaN in gradients alone"))
    assert found == ["zero2_bf16, NaN in gradients alone: skipped on both ranks, the run goes on"]


def test_operations_of_a_save_fail_one_after_the_other(tmp_path):
    found = list(itertools.islice(writes(tmp_path, ["zero1_fp32"], most=2), 4))
    assert [line.split(" of a save, ")[0] for line in found] == [
        f"zero1_fp32: rank {rank} operation {number}" for rank in (0, 1) for number in (1, 2)
    ]
    assert sum(TOLD in line for line in found) >= 3, "rank 0 may be at the tools that it copies, and do without"
