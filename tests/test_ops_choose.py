"""The choice of an attention: none that is wrong, of the others the fastest, and nothing else changes."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from megagpt.errors import ConfigError
from megagpt.ops import choose, load_ops, torch_ops

SHAPE = (2, 24, 2, 32)  # B, T, H, K
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def definition(qkv, **options):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return torch_ops.attention(q, k, v, **options).transpose(1, 2)


def another_order(qkv):
    """The same mathematics in other operations."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    scores = (q @ k.mT) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def sees_the_future(qkv):
    return definition(qkv, causal=False)


def wrong_scale(qkv):
    return definition(qkv, scale=1.02 * qkv.shape[-1] ** -0.5)


def wrong_gradient(qkv):
    """Right going forward; nothing goes back to the values."""
    q, k, v = qkv.unbind(2)
    return definition(torch.stack((q, k, v.detach()), 2))


def wrong_in_one_place(qkv):
    out = definition(qkv)
    return torch.cat((out[:, :-1], 1.1 * out[:, -1:]), 1)


def not_a_number(qkv):
    return definition(qkv) * torch.nan


def refuses(qkv):
    raise RuntimeError("No available kernel. Aborting execution.\nmore")


WRONG = [sees_the_future, wrong_scale, wrong_gradient, wrong_in_one_place, not_a_number, refuses]


def inputs(dtype=torch.float32, T=40, K=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, T, 3, 2, K, generator=generator).to(dtype)


def told(times, *, ran=None):
    """A timer that runs the work and gives the next of ``times``."""
    rest = iter(times)

    def time(work):
        gradient = work()[0]
        assert gradient.shape[2] == 3
        if ran is not None:
            ran.append(gradient.shape)
        return next(rest)

    return time


def never(work):
    raise AssertionError("nothing was to be timed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_differs_by_rounding_alone_is_right(dtype):
    for candidate in (definition, another_order):
        assert choose.why_wrong(candidate, definition, inputs(dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("candidate", WRONG, ids=lambda f: f.__name__)
def test_what_is_wrong_in_output_or_gradient_is_found(candidate, dtype):
    assert choose.why_wrong(candidate, definition, inputs(dtype)) is not None


def test_the_reason_tells_what_is_wrong():
    assert choose.why_wrong(wrong_gradient, definition, inputs()).startswith("its gradient is wrong by ")
    assert choose.why_wrong(sees_the_future, definition, inputs()).startswith("its output is wrong by ")
    assert choose.why_wrong(refuses, definition, inputs()) == "RuntimeError: No available kernel. Aborting execution."


def test_the_fastest_of_those_that_are_right_is_taken():
    ran = []
    candidates = {"own": definition, "wrong": sees_the_future, "other": another_order, "refuses": refuses}
    full = inputs(T=56)
    choice = choose.fastest(candidates, definition, inputs(), full, told([2.0, 1.5], ran=ran))
    assert choice.attention == "other"
    assert choice.milliseconds == {"own": 2.0, "other": 1.5}
    assert choice.dropped.keys() == {"wrong", "refuses"}
    assert ran == [full.shape, full.shape]
    assert str(choice).startswith("attention other (other 1.50 ms; own 2.00 ms; not wrong: its output is wrong by ")


def test_of_equally_fast_ones_the_first_is_taken():
    candidates = {"own": definition, "other": another_order}
    assert choose.fastest(candidates, definition, inputs(), inputs(), told([1.0, 1.0])).attention == "own"


def test_one_that_fails_at_the_size_of_the_model_is_left_out():
    def out_of_memory(qkv):
        if qkv.shape[1] > 50:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return definition(qkv)

    candidates = {"large": out_of_memory, "other": another_order}
    choice = choose.fastest(candidates, definition, inputs(), inputs(T=60), told([1.0]))
    assert choice.attention == "other"
    assert choice.dropped == {"large": "OutOfMemoryError: tried to allocate too much"}


def test_where_none_can_be_timed_the_first_that_is_right_is_taken():
    """Training may have room where timing had none; if not, it says so itself."""

    def fails(work):
        raise torch.OutOfMemoryError("tried to allocate too much")

    candidates = {"wrong": sees_the_future, "own": definition, "other": another_order}
    choice = choose.fastest(candidates, definition, inputs(), inputs(), fails)
    assert choice.attention == "own"
    assert choice.milliseconds == {}
    assert choice.dropped.keys() == {"wrong", "own", "other"}


def test_where_none_is_right_the_reasons_are_told():
    candidates = {"own": sees_the_future, "other": refuses}
    with pytest.raises(ConfigError, match=r"own: its output is wrong.*other: RuntimeError.*--kernels torch"):
        choose.fastest(candidates, definition, inputs(), inputs(), never)


def torch_choice(dropout_p=0.0, **options):
    ops = load_ops("torch", head_width=32, dtype=torch.float32, device="cpu")
    found = choose.choose_attention(
        ops, SHAPE, dtype=torch.float32, device=torch.device("cpu"), dropout_p=dropout_p, **options
    )
    return ops, found


def test_on_this_machine_the_forms_that_torch_has_here_are_timed():
    """A CPU has torch's flash attention and neither of the others."""
    ops, choice = torch_choice(time=told([3.0, 2.0]))
    assert choice.milliseconds == {"torch": 3.0, "flash": 2.0}
    assert choice.dropped.keys() == {"cudnn", "efficient"}
    chosen = choose.with_attention(ops, choice.attention)
    assert chosen.packed_attention is not ops.packed_attention
    for name in vars(ops).keys() - {"packed_attention"}:
        assert getattr(chosen, name) is getattr(ops, name)
    assert choose.why_wrong(chosen.packed_attention, definition, inputs()) is None


def test_dropout_leaves_no_choice():
    ops, choice = torch_choice(dropout_p=0.1, time=never)
    assert choice == choose.Choice("torch", {}, {})
    assert choose.with_attention(ops, choice.attention) is ops


def test_deterministic_algorithms_leave_no_choice():
    torch.use_deterministic_algorithms(True)
    try:
        assert torch_choice(time=never)[1].attention == "torch"
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_earlier_choice_stands_without_timing():
    earlier = choose.Choice("flash", {"flash": 1.0, "torch": 2.0}, {"cudnn": "no"})
    assert torch_choice(kept=earlier, time=never)[1] is earlier


@pytest.mark.parametrize("name", ["cudnn", "triton", "nonsense"])
def test_an_earlier_choice_that_does_not_work_here_is_made_again(name):
    earlier = choose.Choice(name, {name: 1.0}, {})
    assert torch_choice(kept=earlier, time=told([1.0, 2.0]))[1].attention == "torch"


def test_choosing_draws_nothing_from_the_generators_of_the_run():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    torch_choice(time=told([1.0, 2.0]))
    assert torch.equal(torch.rand(3), expected)


def test_what_torchs_attention_does_not_do_goes_to_the_backends_own():
    """A mask that is a function of the seed, and documents that do not see each other."""
    ops = load_ops("torch", head_width=32, dtype=torch.float32, device="cpu")
    chosen = choose.with_attention(ops, "flash")
    qkv = inputs()
    seed, documents = torch.tensor(5), torch.tensor([0, 11, 40])
    for options in ({"dropout_p": 0.3, "seed": seed}, {"cu_seqlens": documents}):
        assert torch.equal(chosen.packed_attention(qkv, **options), ops.packed_attention(qkv, **options))
        assert not torch.allclose(chosen.packed_attention(qkv, **options), chosen.packed_attention(qkv))
    scaled = chosen.packed_attention(qkv, scale=0.5)
    torch.testing.assert_close(scaled, ops.packed_attention(qkv, scale=0.5))


def test_where_the_chosen_form_cannot_serve_a_shape_another_one_does():
    """The choice was made at the shape of training; evaluation and short inputs have others."""
    only_cudnn = choose._sdpa([SDPBackend.CUDNN_ATTENTION], definition)
    with pytest.raises(RuntimeError, match="kernel"):
        only_cudnn(inputs())
    ops = load_ops("torch", head_width=32, dtype=torch.float32, device="cpu")
    torch.testing.assert_close(choose.with_attention(ops, "cudnn").packed_attention(inputs()), definition(inputs()))
