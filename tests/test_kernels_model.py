"""The fused kernels as a backend: whom they serve, and a decoder with them against one in plain torch."""

import contextlib
import importlib.util
import inspect
import subprocess
import sys
import sysconfig
import time

import pytest
import torch

from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import Ops, choose, load_ops, torch_ops, triton_ops
from megagpt_kernels import runtime

MODEL = {"head_width": 64, "dtype": torch.float16, "device": torch.device("cuda")}


@pytest.fixture
def gpu(monkeypatch):
    """A function that takes a compute capability: kernels are as on such a GPU, to be compiled and not launched."""
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setenv("CC", "cc")
    with contextlib.ExitStack() as stack:
        yield lambda *capability: stack.enter_context(runtime.recording(lambda *_: None, capability))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (9, 0), (10, 0)], ids=str)
@pytest.mark.parametrize("head_width", [32, 64, 80, 96, 128, 256])
def test_every_gpu_with_tensor_cores_is_served(gpu, capability, head_width):
    gpu(*capability)
    assert triton_ops.why_not(**{**MODEL, "head_width": head_width}) is None


REFUSED = {
    "head width": (
        (9, 0),
        {"head_width": 40},
        "its heads are 40 wide and kernels are made for 32, 64, 80,",
    ),
    "dtype": ((9, 0), {"dtype": torch.float64}, "torch.float64 is not one of float16, bfloat16 and float32"),
    "device": ((9, 0), {"device": torch.device("xpu")}, "the model is on xpu and kernels need a GPU"),
    "capability": ((6, 1), {}, "compute capability 6.1 is below 7.0"),
    "bfloat16": ((7, 5), {"dtype": torch.bfloat16}, "compute capability 7.5 has no bfloat16 arithmetic"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_has_its_reason(gpu, case):
    capability, changes, reason = REFUSED[case]
    gpu(*capability)
    assert reason in triton_ops.why_not(**{**MODEL, **changes})


@pytest.mark.parametrize("package", ["triton", "megagpt_kernels"])
def test_a_package_that_is_missing_is_named(monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert triton_ops.why_not(**MODEL) == f"the package {package} is not installed"


def test_a_triton_that_is_too_old_is_named(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.setattr(runtime.triton, "__version__", "3.5.1")
    assert triton_ops.why_not(**MODEL) == "Triton 3.5.1 is older than 3.6"


def test_a_triton_without_what_kernels_are_written_with_is_refused_too():
    """As old as the one that the oldest supported torch brings; in a process where nothing has been imported yet."""
    script = (
        "import torch, triton; del triton.knobs; triton.__version__ = '3.2.0'\n"
        "from megagpt.ops import triton_ops\n"
        "print(triton_ops.why_not(head_width=64, dtype=torch.float16, device=torch.device('cuda'), asked_for=False))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Triton 3.2.0 is older than 3.6"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_that_there_is_none(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert triton_ops.why_not(**MODEL) == "torch sees no GPU"


def test_without_a_c_compiler_the_reason_tells_what_to_install(gpu, monkeypatch):
    gpu(9, 0)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "Triton needs a C compiler and there is none: install gcc" in triton_ops.why_not(**MODEL)


def test_without_pythons_headers_the_reason_tells_what_to_install(gpu, monkeypatch, tmp_path):
    gpu(9, 0)
    monkeypatch.setitem(sysconfig.get_config_vars(), "INCLUDEPY", str(tmp_path))
    assert triton_ops.why_not(**MODEL) == f"Triton needs Python's headers and {tmp_path} has none: install python3-dev"


def test_the_interpreter_serves_a_cpu_that_asks_for_it_and_is_never_taken_by_itself(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    model = {"head_width": 64, "dtype": torch.float32, "device": "cpu"}
    assert load_ops("triton", **model).name == "triton"
    ops = load_ops("auto", **model)
    assert ops.name == "cpu"
    assert ops.reason == "triton cannot serve this model: the model is on cpu and kernels need a GPU"


def test_with_a_gpu_too_the_interpreter_is_never_taken_by_itself(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    assert triton_ops.why_not(**MODEL, asked_for=False) == "TRITON_INTERPRET=1 would make it slow"


def test_asked_for_on_a_cpu_without_the_interpreter_it_is_one_error(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(ConfigError) as caught:
        load_ops("triton", head_width=64, dtype=torch.float32, device="cpu")
    assert str(caught.value) == (
        "--kernels triton: triton cannot serve this model: the model is on cpu and kernels need a GPU "
        "(or TRITON_INTERPRET=1, which is slow). Use --kernels torch or auto"
    )


@pytest.mark.parametrize("operation", [name for name in vars(torch_ops) if name in Ops.__dataclass_fields__])
def test_kernels_take_the_arguments_of_the_definition(operation):
    """Masks are a backend's own affair, and kernels can be asked for the same bits in every run."""
    expected = inspect.signature(getattr(torch_ops, operation)).parameters
    found = inspect.signature(getattr(triton_ops, operation)).parameters
    assert [name for name in found if name != "deterministic"] == [name for name in expected if name != "masks"]
    for name in found.keys() & expected.keys():
        assert (found[name].default, found[name].kind) == (expected[name].default, expected[name].kind), name


# A decoder with the kernels -------------------------------------------------------------------------------------

SHAPE = {"vocab_size": 61, "seq_len": 12, "n_layer": 2, "n_head": 2, "d_model": 64, "d_ff": 96}
NARROW = {"n_layer": 1, "n_head": 1, "d_model": 32, "d_ff": 48}  # for what takes many passes of the interpreter
NORMS = pytest.mark.parametrize("norm", ["pre", "post"])


def build(kernels, dtype=torch.float32, device="cpu", dropout=0.0, **changes):
    """The same weights at every call."""
    rates = dict.fromkeys(("embd_dropout", "attn_dropout", "resid_dropout"), dropout)
    config = GPTConfig(**{**SHAPE, **rates, **changes})
    torch.manual_seed(0)
    model = GPT(config, load_ops(kernels, head_width=config.head_width, dtype=dtype, device=device))
    with torch.no_grad():  # at their initial values, biases and positions would hardly be seen
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.to(device, dtype)


def batch(device, B=2, T=11):
    ids = torch.randint(61, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    targets = ids[:, 1:].contiguous()
    targets[0, :4] = -100
    return ids[:, :-1], targets


def loss_of(model, device):
    """With dropout, seeds and so masks are the same for every model."""
    torch.manual_seed(1)
    return model(*batch(device))


def loss_and_gradients(model, device, forward=None):
    loss = loss_of(model if forward is None else forward, device)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))}


@NORMS
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loss_and_every_gradient_are_as_accurate_as_torchs(norm, dropout, dtype, device):
    n_layer = 2 if dtype == torch.float32 and dropout else 1
    changes = {"norm": norm, "dropout": dropout, "device": device, "n_layer": n_layer}
    rounded = build("torch", dtype, **changes).state_dict()  # all compute from the same numbers
    found, theirs, truth = (
        loss_and_gradients(model, device)
        for model in (
            build("triton", dtype, **changes),
            build("torch", dtype, **changes),
            build("torch", torch.float64, **changes),
        )
        if model.load_state_dict(rounded)
    )
    for name, exact in truth.items():
        error, baseline = ((result[name].double() - exact).abs().max().item() for result in (found, theirs))
        floor = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert error <= 3 * baseline + floor, f"{name}: error {error:.2e}, torch's own {baseline:.2e}"


@NORMS
def test_dropout_masks_are_those_of_the_torch_backend(norm, device):
    """Other masks would give another loss: by far more than rounding."""
    with torch.no_grad():
        with_masks, expected, without = (
            loss_of(build(kernels, norm=norm, dropout=rate, device=device), device)
            for kernels, rate in (("triton", 0.3), ("torch", 0.3), ("torch", 0.0))
        )
    torch.testing.assert_close(with_masks, expected, rtol=0, atol=1e-5)
    assert (without - expected).abs() > 1e-3


def losses_of_training(model, device, steps=20):
    """Each step on one of four batches, so that there is something to learn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(61, (4, 1, 9), generator=torch.Generator().manual_seed(2)).to(device)
    torch.manual_seed(3)
    losses = []
    for step in range(steps):
        window = ids[step % 4]
        loss = model(window[:, :-1], window[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@NORMS
def test_twenty_steps_of_training_follow_the_torch_backend(norm, device):
    """To 1e-4, the tolerance that training under ZeRO has against a plain loop."""
    ours, theirs = (
        losses_of_training(build(kernels, norm=norm, **NARROW, dropout=0.1, device=device), device)
        for kernels in ("triton", "torch")
    )
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert theirs[-1] < theirs[0] - 0.5, "the model has to learn for the comparison to mean anything"


@NORMS
def test_a_checkpoint_is_the_same_under_either_backend(norm):
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in build(kernels, norm=norm).state_dict().items()}
        for kernels in ("triton", "torch")
    ]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])


@NORMS
def test_a_graph_used_twice_gives_the_same_gradients(norm, device, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses products on a GPU
    torch.use_deterministic_algorithms(True)
    try:
        model = build("triton", norm=norm, **NARROW, dropout=0.1, device=device)
        loss, parameters = model(*batch(device)), list(model.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        second = torch.autograd.grad(loss, parameters)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


@NORMS
def test_recomputed_blocks_give_the_same_gradients(norm, device):
    changes = {"norm": norm, "dropout": 0.1, "device": device, **NARROW}
    plain = loss_and_gradients(build("triton", **changes), device)
    recomputed = loss_and_gradients(build("triton", **changes, activation_checkpointing=1), device)
    for name in plain:
        if device == "cpu":
            assert torch.equal(recomputed[name], plain[name])
        else:  # the order in which attention's tiles are added varies
            torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-4, atol=1e-6)


@NORMS
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_model_is_one_graph_and_gives_the_same(norm, device):
    model = build("triton", norm=norm, **NARROW, dropout=0.1, device=device)
    plain = loss_and_gradients(model, device)
    graph = loss_and_gradients(model, device, torch.compile(model, fullgraph=True, backend="aot_eager"))
    for name in plain:
        torch.testing.assert_close(graph[name], plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measuring needs a GPU")
@pytest.mark.parametrize("shape", [(64, 512, 12, 64), (2, 16384, 16, 128)], ids=["gpt1", "long"])
def test_attention_is_chosen_in_less_than_a_second(shape):
    """Once everything is compiled, and at best: other tests may be using the GPU at the same time."""
    model = {"dtype": torch.bfloat16, "device": torch.device("cuda")}
    ops = load_ops("triton", head_width=shape[-1], **model)
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        choice = choose.choose_attention(ops, shape, **model, dropout_p=0.0)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 1
    assert "triton" in choice.milliseconds
    assert choice.milliseconds[choice.attention] == min(choice.milliseconds.values())
