"""The whole decoder: causal, exact under recomputation, tied, and with dropout exactly where it belongs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from numerics import LargestTensor

from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

SHAPE = {"vocab_size": 61, "seq_len": 20, "n_layer": 4, "n_head": 2, "d_model": 16}
NORMS = pytest.mark.parametrize("norm", ["pre", "post"])
KERNELS = pytest.mark.parametrize("kernels", ["torch", "cpu"])
NO_DROPOUT = dict.fromkeys(("embd_dropout", "attn_dropout", "resid_dropout"), 0.0)


def build(kernels="torch", dtype=torch.float32, seed=0, **changes):
    config = GPTConfig(**{**SHAPE, **changes})
    torch.manual_seed(seed)
    model = GPT(config, load_ops(kernels, head_width=config.head_width, dtype=dtype, device="cpu")).to(dtype)
    with torch.no_grad():  # at their initial values, biases and positions would hardly be seen
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape).to(dtype))
    return model


def batch(B=3, T=20, seed=0):
    ids = torch.randint(61, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:].contiguous()


def loss_and_gradients(model, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(*batch())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@NORMS
@KERNELS
@pytest.mark.parametrize("mode", ["train", "eval"])
@torch.no_grad()
def test_a_token_changes_no_logit_before_it(norm, kernels, mode):
    model = build(kernels, norm=norm)
    model.train(mode == "train")
    ids, _ = batch()
    for t in (1, 7, 19):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % 61
        torch.manual_seed(5)
        before = model(ids)
        torch.manual_seed(5)
        after = model(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


@NORMS
@KERNELS
@torch.no_grad()
def test_what_follows_a_text_does_not_matter(norm, kernels):
    """A right-padded batch needs no mask."""
    model = build(kernels, norm=norm).eval()
    ids, _ = batch()
    torch.testing.assert_close(model(ids)[:, :9], model(ids[:, :9]), rtol=0, atol=1e-6)


@NORMS
@torch.no_grad()
def test_a_permuted_batch_gives_the_permuted_logits(norm):
    model, order = build(norm=norm).eval(), torch.tensor([2, 0, 1])
    ids, _ = batch()
    torch.testing.assert_close(model(ids)[order], model(ids[order]), rtol=0, atol=1e-6)


@NORMS
@KERNELS
def test_the_loss_is_the_mean_cross_entropy_of_the_logits(norm, kernels):
    model = build(kernels, norm=norm, **NO_DROPOUT)
    ids, targets = batch()
    targets[0, :5] = -100
    loss = model(ids, targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    for mine, theirs in zip(ours, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_output_projection_is_the_token_embedding():
    model = build(**NO_DROPOUT)
    assert not [name for name in model.state_dict() if "head" in name]
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(ids, torch.ones(1, 4, dtype=torch.int64)).backward()
    # Token 0 is read, token 1 is the target; the others are only ever predicted against.
    assert (model.wte.weight.grad[2:].abs().sum(1) > 0).all()
    with torch.no_grad():
        before = model(ids)
        model.wte.weight[7] *= 2
        after = model(ids)
    torch.testing.assert_close(after[..., 7], 2 * before[..., 7])
    assert torch.equal(after[..., :7], before[..., :7])


@torch.no_grad()
def test_the_logits_of_what_comes_next_are_the_last_ones():
    model = build().eval()
    ids, _ = batch()
    torch.testing.assert_close(model.next_logits(ids), model(ids)[:, -1])


def test_logits_are_never_whole_in_training():
    model = build(vocab_size=5003, d_model=8, seq_len=1000, n_layer=1)
    ids = torch.randint(5003, (2, 1001))
    with LargestTensor() as largest:
        model(ids[:, :-1], ids[:, 1:].contiguous()).backward()
    assert largest.elements < 2 * 1000 * 5003 / 2


@NORMS
@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_recomputed_blocks_give_the_same_bits_with_dropout(norm, kernels, dtype, every):
    changes = {"norm": norm, "kernels": kernels, "dtype": dtype}
    loss, gradients = loss_and_gradients(build(**changes))
    model = build(**changes, activation_checkpointing=every)
    runs = [0] * 4
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    again, recomputed = loss_and_gradients(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)
    assert runs == [2 if i % every == 0 else 1 for i in range(4)]


def test_recomputation_keeps_less():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(*batch())
        return sum(sizes)

    assert kept(build(activation_checkpointing=1)) < kept(build(activation_checkpointing=2)) < kept(build())


@NORMS
@KERNELS
@torch.no_grad()
def test_dropout_is_off_in_evaluation(norm, kernels):
    model, plain = build(kernels, norm=norm).eval(), build(kernels, norm=norm, **NO_DROPOUT).train()
    ids, targets = batch()
    state = torch.get_rng_state()
    assert torch.equal(model(ids, targets), model(ids, targets))
    assert torch.equal(model(ids, targets), plain(ids, targets))
    model(ids)
    torch.set_rng_state(state)
    model.eval()(ids)
    assert torch.equal(torch.get_rng_state(), state), "evaluation must not move the generator that a resumed run needs"


@NORMS
@KERNELS
@pytest.mark.parametrize("rate", NO_DROPOUT)
def test_each_rate_of_dropout_has_its_effect_and_follows_the_seed(norm, kernels, rate):
    model = build(kernels, norm=norm, **{**NO_DROPOUT, rate: 0.3})
    plain, _ = loss_and_gradients(build(kernels, norm=norm, **NO_DROPOUT))
    first, gradients = loss_and_gradients(model, seed=1)
    again, same = loss_and_gradients(model, seed=1)
    other, _ = loss_and_gradients(model, seed=2)
    assert torch.equal(first, again)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert len({plain.item(), first.item(), other.item()}) == 3


@NORMS
def test_every_dropout_of_a_pass_has_a_seed_of_its_own_and_the_rate_of_its_place(norm):
    """Embedding, attention probabilities, and both branches of every block, and nowhere else."""
    model = build(norm=norm, embd_dropout=0.1, attn_dropout=0.2, resid_dropout=0.3)
    used = []

    def noting(operation, rate):
        def fn(*args, **kwargs):
            if kwargs[rate] > 0:
                used.append((kwargs[rate], kwargs["seed"].item()))
            return operation(*args, **kwargs)

        return fn

    ops = dataclasses.replace(
        model.ops,
        dropout=noting(model.ops.dropout, "p"),
        packed_attention=noting(model.ops.packed_attention, "dropout_p"),
        add_layer_norm=noting(model.ops.add_layer_norm, "dropout_p"),
    )
    GPT(model.config, ops)(*batch())
    assert [rate for rate, _ in used] == [0.1] + [0.2, 0.3, 0.3] * 4
    assert len({seed for _, seed in used}) == len(used)


@NORMS
def test_dropout_of_whole_tables_is_shared_by_all_occurrences_and_the_output(norm):
    """One mask a pass over the tables' elements, as in GPT-1's released code: the pass is that of dropped tables."""
    changes = {"norm": norm, **NO_DROPOUT}
    model = build(**{**changes, "embd_dropout": 0.4}, embd_dropout_mode="matrix")
    seen = []

    def noting(x, *, p, seed):
        seen.append(model.ops.dropout(x, p=p, seed=seed).detach())
        return model.ops.dropout(x, p=p, seed=seed)

    dropping = GPT(model.config, dataclasses.replace(model.ops, dropout=noting))
    dropping.load_state_dict(model.state_dict())
    loss = dropping(*batch())
    words, places, output = seen
    assert torch.equal(words, output)
    assert (words == 0).double().mean().item() == pytest.approx(0.4, abs=0.1)
    assert (places == 0).double().mean().item() == pytest.approx(0.4, abs=0.15)
    plain = build(**changes)
    with torch.no_grad():
        plain.wte.weight.copy_(words)
        plain.wpe.weight.copy_(places)
    torch.testing.assert_close(loss, plain(*batch()))
    loss.backward()
    assert (dropping.wte.weight.grad[words == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@NORMS
@KERNELS
def test_a_model_of_another_dtype_stays_in_it(norm, kernels, dtype):
    model = build(kernels, dtype, norm=norm)
    assert model.hidden(batch()[0]).dtype == dtype
    loss, gradients = loss_and_gradients(model)
    exact, _ = loss_and_gradients(build("torch", torch.float64, norm=norm, **NO_DROPOUT))
    assert loss.item() == pytest.approx(exact.item(), rel=0.2)
    assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients.values())


@KERNELS
@pytest.mark.parametrize("changes", [{"norm": "pre"}, {"norm": "post"}, {"backbone": "lstm", "n_layer": 1}], ids=str)
def test_real_positions_alone_have_the_states_and_gradients_that_they_have_among_padding(kernels, changes):
    gpt = build(kernels, **NO_DROPOUT, activation_checkpointing=2, **changes)
    lengths = torch.tensor([3, 20, 1, 6])
    ids, _ = batch(4)
    rows = (torch.arange(20) < lengths[:, None]).flatten().nonzero()[:, 0]
    among_padding, alone = gpt.hidden(ids).flatten(0, 1)[rows], gpt.hidden(ids, rows)
    torch.testing.assert_close(alone, among_padding, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(alone)
    found, expected = (torch.autograd.grad((h * weights).sum(), list(gpt.parameters())) for h in (alone, among_padding))
    for (name, _), a, b in zip(gpt.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
