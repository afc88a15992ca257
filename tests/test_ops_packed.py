"""Weights in a second layout for products of a few rows, and when there is room for it."""

import copy
from functools import partial

import psutil
import pytest
import torch

from megagpt.model.blocks import Linear
from megagpt.model.config import GPTConfig
from megagpt.model.decoding import for_decoding
from megagpt.model.gpt import GPT
from megagpt.ops import cpu_ops, load_ops, packed_linear, torch_ops
from megagpt.ops.packed_linear import PackedLinear, free_memory

GIB = 1 << 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_projection_is_the_projection_for_any_number_of_rows(dtype, has_bias):
    torch.manual_seed(0)
    weight = torch.randn(33, 20).to(dtype)
    bias = torch.randn(33).to(dtype) if has_bias else None
    linear = PackedLinear(weight, rows=8, dtype=torch.float32, linear=cpu_ops.linear)
    with torch.inference_mode():
        for shape in [(1, 20), (2, 20), (3, 20), (2, 4, 20), (64, 20), (65, 20), (20,)]:
            x = torch.randn(shape).to(dtype)
            exact = torch_ops.linear(x.double(), weight.double(), None if bias is None else bias.double())
            found = linear(x, weight, bias)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5)


def test_few_rows_are_multiplied_by_the_packed_weights_and_others_by_the_weight_itself():
    weight = torch.ones(4, 6)
    linear = PackedLinear(weight, rows=8, dtype=torch.float32, linear=torch_ops.linear)
    changed = torch.zeros(4, 6)
    used = {rows: bool(linear(torch.ones(rows, 6), changed).any()) for rows in (2, 3, 64, 65)}
    assert used == {2: False, 3: True, 64: True, 65: False}
    # What has to be widened each time is slower at any number of rows.
    wide = PackedLinear(weight.bfloat16(), rows=8, dtype=torch.float32, linear=torch_ops.linear)
    assert wide(torch.ones(65, 6).bfloat16(), changed.bfloat16()).all()


def test_a_model_is_packed_for_three_texts_and_more_and_stays_as_it_was(monkeypatch):
    config = GPTConfig(vocab_size=50, seq_len=24, n_layer=2, n_head=2, d_model=16)
    model = GPT(config, load_ops("cpu", head_width=8, dtype=torch.float32, device="cpu")).eval()
    before = copy.deepcopy(model.state_dict())
    for rows in (1, 2):
        assert for_decoding(model, model.wte.weight, rows) == (model, model.ops.linear)
    twin, linear = for_decoding(model, model.wte.weight, 3)
    projections = [name for name, module in twin.named_modules() if isinstance(module, Linear)]
    assert len(projections) == 4 * config.n_layer
    assert isinstance(linear, PackedLinear)
    for name in projections:
        assert isinstance(twin.get_submodule(name).ops.linear, PackedLinear)
        assert model.get_submodule(name).ops is model.ops
        assert twin.get_submodule(name).weight is model.get_submodule(name).weight
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    need = 4 * (50 * 16 + 2 * 12 * 16 * 16)
    for free, expected in ((2 * need, PackedLinear), (2 * need - 1, type(model.ops.linear))):
        monkeypatch.setattr(packed_linear, "free_memory", partial(int, free))
        assert isinstance(for_decoding(model, model.wte.weight, 8)[1], expected)


def test_free_memory_is_the_machines_or_that_of_the_control_group_and_what_is_above_it(tmp_path):
    machine = psutil.virtual_memory().total
    assert 0 < free_memory() <= machine
    (tmp_path / "proc/self").mkdir(parents=True)
    assert free_memory(tmp_path) > GIB // 64  # no control groups

    (tmp_path / "proc/self/cgroup").write_text("1:cpu:/elsewhere\n0::/job/step\n")
    step = tmp_path / "sys/fs/cgroup/job/step"
    step.mkdir(parents=True)
    for folder, limit, used in ((step, "max", 5), (step.parent, 1000, 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    assert free_memory(tmp_path) == 300
    (step / "memory.max").write_text("105\n")
    assert free_memory(tmp_path) == 100

    (tmp_path / "proc/self/cgroup").write_text("4:memory:/slurm/job_7\n1:cpu,cpuacct:/slurm\n")  # of the first kind
    job = tmp_path / "sys/fs/cgroup/memory/slurm/job_7"
    job.mkdir(parents=True)
    for folder, limit in ((job, 2**63 - 4096), (job.parent, 900)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text("800\n")
    assert free_memory(tmp_path) == 100
