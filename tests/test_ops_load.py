"""Which backend serves a model, and why."""

import inspect

import pytest
import torch

from megagpt.errors import ConfigError
from megagpt.ops import Ops, cpu_ops, load_ops, torch_ops

MODEL = {"head_width": 64, "dtype": torch.float32}


def test_on_a_cpu_auto_takes_the_forms_made_for_it_and_says_why():
    ops = load_ops("auto", **MODEL, device="cpu")
    assert ops.name == "cpu"
    assert ops.attention is cpu_ops.attention
    assert ops.reason.startswith("triton cannot serve this model: ")


def test_elsewhere_auto_takes_torch_and_says_why():
    ops = load_ops("auto", **MODEL, device="cuda")
    assert ops.name == "torch"
    assert "cpu cannot serve this model: its forms are for a CPU, and the model is on cuda" in ops.reason


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_a_backend_asked_for_is_taken(name):
    ops = load_ops(name, **MODEL, device="cpu")
    assert (ops.name, ops.reason) == (name, "asked for")


@pytest.mark.parametrize(("name", "device"), [("triton", "cpu"), ("cpu", "cuda")])
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
