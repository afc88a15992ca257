"""Which backend serves a model, and why."""

import inspect
import subprocess
import sys

import pytest
import torch

from megagpt.errors import ConfigError
from megagpt.ops import Ops, cpu_ops, load_ops, precision, torch_ops

MODEL = {"head_width": 64, "dtype": torch.float32}


def test_on_a_cpu_auto_takes_the_forms_made_for_it_and_says_why():
    ops = load_ops("auto", **MODEL, device="cpu")
    assert ops.name == "cpu"
    assert ops.attention is cpu_ops.attention
    assert ops.reason.startswith("triton cannot serve this model: ")


def test_without_a_gpu_auto_imports_no_triton():
    """In a fresh process; it takes a second, and Triton exists for few machines."""
    program = """if True:
        import sys, torch
        from megagpt.ops import load_ops
        assert load_ops("auto", head_width=64, dtype=torch.float32, device="cpu").name == "cpu"
        sys.exit(", ".join({"triton", "megagpt_kernels"} & sys.modules.keys()) or 0)
    """
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_elsewhere_auto_takes_torch_and_says_why():
    ops = load_ops("auto", **MODEL, device="meta")
    assert ops.name == "torch"
    assert "cpu cannot serve this model: its forms are for a CPU, and the model is on meta" in ops.reason


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_a_backend_asked_for_is_taken(name):
    ops = load_ops(name, **MODEL, device="cpu")
    assert (ops.name, ops.reason) == (name, "asked for")


@pytest.mark.parametrize(("name", "device"), [("triton", "meta"), ("cpu", "meta")])
def test_a_backend_that_cannot_serve_is_refused_with_its_reason_and_the_way_out(name, device):
    with pytest.raises(
        ConfigError, match=rf"--kernels {name}: {name} cannot serve this model: .*--kernels torch or auto"
    ):
        load_ops(name, **MODEL, device=device)


def test_a_misspelt_backend_gets_the_nearest_name():
    with pytest.raises(ConfigError, match=r"--kernels trition is unknown \(did you mean 'triton'\?\)"):
        load_ops("trition", **MODEL, device="cpu")


@pytest.mark.parametrize("operation", [name for name in vars(torch_ops) if name in Ops.__dataclass_fields__])
def test_every_backend_takes_the_arguments_of_the_definition(operation):
    """Masks are a backend's own affair, and the cpu backend may pass what it does not look at through."""
    expected = [name for name in inspect.signature(getattr(torch_ops, operation)).parameters if name != "masks"]
    found = inspect.signature(getattr(cpu_ops, operation)).parameters
    rest = [name for name, p in found.items() if p.kind is p.VAR_KEYWORD]
    assert rest or [name for name in found if name != "masks"] == expected
    assert set(found) - set(rest) - {"masks"} <= set(expected)


def test_products_are_computed_in_their_own_dtype_where_there_are_instructions_for_it(monkeypatch):
    for dtype in (torch.float32, torch.float64):
        assert precision.product_dtype(torch.empty(1, dtype=dtype)) == dtype
    for dtype in (torch.bfloat16, torch.float16):
        assert precision.product_dtype(torch.empty(1, dtype=dtype, device="meta")) == dtype
        for has, expected in ((True, dtype), (False, torch.float32)):
            monkeypatch.setattr(precision, "_cpu_multiplies", lambda dtype, has=has: has)
            assert precision.product_dtype(torch.empty(1, dtype=dtype)) == expected


def test_a_torch_that_does_not_tell_what_the_cpu_can_do_gets_float32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    ask = precision._cpu_multiplies.__wrapped__
    assert not ask(torch.bfloat16)
    assert not ask(torch.float16)
