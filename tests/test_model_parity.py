"""The same weights give the same logits as in transformers, which was written by others."""

import functools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from megagpt.errors import CheckpointError
from megagpt.model.config import GPTConfig
from megagpt.model.generate import Generation, Text
from megagpt.model.gpt import GPT
from megagpt.model.interop import from_transformers, to_transformers
from megagpt.model.sampling import Sampling
from megagpt.ops import load_ops

SHAPE = {"vocab_size": 53, "seq_len": 24, "n_layer": 3, "n_head": 4, "d_model": 32}
NORMS = pytest.mark.parametrize("norm", ["pre", "post"])
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


def their_model(norm):
    rates = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)
    shape = {"vocab_size": 53, "n_positions": 24, "n_layer": 3, "n_head": 4, "n_embd": 32, **rates}
    model = GPT2LMHeadModel(GPT2Config(**shape)) if norm == "pre" else OpenAIGPTLMHeadModel(OpenAIGPTConfig(**shape))
    return model.eval()


def randomised(model, seed):
    """Every tensor drawn anew so that each moves the logits: projections keep the variance, gains are around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 2:
                p.copy_(noise / 32**0.5)
            else:
                p.copy_(0.5 * noise + (1.0 if "ln_" in name and name.endswith("weight") else 0.0))
    return model


def our_model(norm, kernels="torch"):
    config = GPTConfig(**SHAPE, norm=norm)
    return GPT(config, load_ops(kernels, head_width=config.head_width, dtype=torch.float32, device="cpu")).eval()


@functools.cache
def tokens(seed, length):
    return torch.randint(53, (3, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.parametrize("length", [1, 2, 17, 24])
@SEEDS
@NORMS
@torch.no_grad()
def test_logits_are_those_of_transformers(norm, seed, length, kernels):
    theirs, ours = randomised(their_model(norm), seed), our_model(norm, kernels)
    ours.load_state_dict(from_transformers(theirs.state_dict(), ours.config))
    ids = tokens(seed, length)
    expected = theirs(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-5)


@SEEDS
@NORMS
@torch.no_grad()
def test_our_weights_work_in_transformers(norm, seed):
    ours, theirs = randomised(our_model(norm), seed), their_model(norm)
    theirs.load_state_dict(to_transformers(ours.state_dict(), ours.config))
    ids = tokens(seed, 20)
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-5)


@NORMS
@torch.no_grad()
def test_every_tensor_counts_in_the_comparison(norm):
    """Otherwise an error in it would not show."""
    model, ids = randomised(our_model(norm), 0), tokens(0, 24)
    logits = model(ids)
    for name, p in model.named_parameters():
        kept = p.clone()
        p.add_(torch.linspace(-0.1, 0.1, p.numel()).view(p.shape))
        assert (model(ids) - logits).abs().max() > 1e-3, name
        p.copy_(kept)


@SEEDS
@NORMS
def test_there_and_back_is_the_identity(norm, seed):
    ours, theirs = randomised(our_model(norm), seed), randomised(their_model(norm), seed)
    for state, there_and_back in (
        (ours.state_dict(), from_transformers(to_transformers(ours.state_dict(), ours.config), ours.config)),
        (theirs.state_dict(), to_transformers(from_transformers(theirs.state_dict(), ours.config), ours.config)),
    ):
        assert there_and_back.keys() == state.keys()
        for name, x in state.items():
            assert torch.equal(there_and_back[name], x), name
            assert there_and_back[name].is_contiguous(), name


@NORMS
def test_files_without_prefix_or_head_and_with_causal_masks_are_read(norm):
    """As the published files of both models are."""
    theirs, config = randomised(their_model(norm), 0), our_model(norm).config
    state = {name.removeprefix("transformer."): x for name, x in theirs.state_dict().items() if "lm_head" not in name}
    state["h.0.attn.bias"] = torch.ones(24, 24).tril().view(1, 1, 24, 24)
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    expected = from_transformers(theirs.state_dict(), config)
    found = from_transformers(state, config)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert found.keys() == expected.keys()


@NORMS
def test_names_and_shapes_are_exact(norm):
    theirs, ours = their_model(norm).state_dict(), our_model(norm)
    mlp = "transformer.h.1.mlp.c_fc.weight"
    position = "transformer.wpe.weight" if norm == "pre" else "transformer.positions_embed.weight"
    cases = {
        r"lack h\.1\.mlp\.c_fc\.weight, which a .*-norm model of 3 blocks needs": without(theirs, mlp),
        r"hold h\.3\.ln_1\.bias, h\.3\.ln_1\.weight, which a .*-norm model of 3 blocks does not have": {
            **theirs,
            "transformer.h.3.ln_1.weight": torch.ones(32),
            "transformer.h.3.ln_1.bias": torch.ones(32),
        },
        r"is \(128, 32\) and the model needs \(32, 128\)": {**theirs, mlp: theirs[mlp].T},
        r"is \(23, 32\) and the model needs \(24, 32\)": {**theirs, position: theirs[position][1:]},
        r"lm_head\.weight differs from": {**theirs, "lm_head.weight": theirs["lm_head.weight"] + 1},
    }
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=message):
            from_transformers(state, ours.config)
    with pytest.raises(CheckpointError, match=r"lack wpe\.weight, which"):
        to_transformers(without(ours.state_dict(), "wpe.weight"), ours.config)


def without(state, name):
    return {key: x for key, x in state.items() if key != name}


@pytest.mark.parametrize(("norm", "other"), [("pre", "post"), ("post", "pre")])
def test_weights_of_the_other_order_are_refused(norm, other):
    with pytest.raises(CheckpointError, match=f"a {other}-norm model"):
        from_transformers(their_model(norm).state_dict(), our_model(other).config)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@NORMS
def test_greedy_texts_are_those_of_transformers_generate(norm, penalty):
    """Prompts of three lengths in one batch here, alone there; to the end of the context."""
    theirs, ours = randomised(their_model(norm), 0), our_model(norm, "auto")
    with torch.no_grad():  # otherwise the same token is the likeliest everywhere
        for name, p in theirs.named_parameters():
            p.mul_(5.0 if "wpe" in name or "positions_embed" in name else 0.1 if name.endswith("bias") else 1.0)
    ours.load_state_dict(from_transformers(theirs.state_dict(), ours.config))
    generation, texts = Generation(ours, max_texts=3), []
    for length, ids in zip((1, 4, 9), tokens(0, 9).tolist(), strict=True):
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        texts.append(Text(ids[:length], max_new_tokens=24 - length, sampling=sampling))
        generation.join(texts[-1])
    while generation.step():
        pass
    for text in texts:
        prompt = torch.tensor([text.ids[: text.n_prompt]])
        options = {"max_length": 24, "do_sample": False, "repetition_penalty": penalty, "pad_token_id": 0}
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **options)
        assert text.ids == expected[0].tolist()
    assert len({token for text in texts for token in text.new}) > 4
