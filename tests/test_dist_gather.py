"""Values of all ranks, by rank, without pickle."""

import pytest
from distributed import run_ranks

from megagpt.dist import gather_json


def gathered(values):
    import torch

    torch.distributed.init_process_group("gloo")
    try:
        return gather_json(values[torch.distributed.get_rank()])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "values",
    [[{"name": "ä" * 300, "size": 2**60}, "short"], [[1.5, None], None], [None, None], [0, ""]],
    ids=["texts of any length", "one has nothing", "nobody has anything", "what is empty but there"],
)
def test_every_rank_gets_the_values_of_all_by_rank(values):
    assert [result for result, _ in run_ranks(gathered, 2, values)] == [values, values]


def test_alone_the_value_is_all_there_is():
    assert gather_json({"a": 1}) == [{"a": 1}]
