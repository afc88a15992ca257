"""Drawing text: the likeliest token, the right distribution, and where it ends."""

import collections

import pytest
import torch

from megagpt.model.config import GPTConfig
from megagpt.model.generate import generate
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

N = 1200  # draws
NOISE = 5 * (0.25 / N) ** 0.5


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(vocab_size=11, seq_len=6, n_layer=2, n_head=2, d_model=8)
    torch.manual_seed(6)
    model = GPT(config, load_ops("torch", head_width=4, dtype=torch.float32, device="cpu")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" not in name:
                p.add_(0.5 * torch.randn(p.shape))
    return model


def probabilities(model, ids, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([ids]))[0, -1] / temperature).softmax(0)


def drawn(model, ids, n=N, **options):
    """How often each token comes next."""
    counts = collections.Counter(generate(model, ids, max_new_tokens=1, seed=i, **options)[0] for i in range(n))
    return torch.tensor([counts[token] / n for token in range(11)])


def test_at_temperature_zero_each_token_is_the_likeliest_given_the_last_ones(model):
    """Also where the text is longer than what the model sees."""
    ids, expected = [3, 1], []
    for _ in range(12):
        expected.append(int(probabilities(model, (ids + expected)[-6:]).argmax()))
    assert generate(model, ids, max_new_tokens=12, temperature=0) == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_tokens_are_drawn_from_the_models_distribution(model, temperature):
    expected = probabilities(model, [3, 1], temperature)
    found = drawn(model, [3, 1], temperature=temperature)
    assert (found - expected).abs().max() < NOISE


def test_top_k_leaves_only_the_k_likeliest_in_their_proportions(model):
    expected = probabilities(model, [3, 1])
    least = expected.topk(3).values[-1]
    expected = expected.where(expected >= least, 0.0)
    found = drawn(model, [3, 1], top_k=3)
    assert (found > 0).sum() == 3
    assert (found - expected / expected.sum()).abs().max() < NOISE


def test_the_likeliest_alone_is_the_greedy_choice_and_more_than_all_is_all(model):
    options = {"max_new_tokens": 8, "seed": 4}
    assert generate(model, [2], top_k=1, **options) == generate(model, [2], temperature=0, max_new_tokens=8)
    assert generate(model, [2], top_k=99, **options) == generate(model, [2], **options)


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_the_lowest_temperatures_take_the_likeliest(model, temperature):
    """Logits divided by them were infinite, and a distribution of them is not a number."""
    options = {"max_new_tokens": 8, "seed": 4}
    assert generate(model, [2], temperature=temperature, **options) == generate(model, [2], temperature=0, **options)


def test_a_seed_fixes_the_text_and_the_default_generator_is_not_touched(model):
    state = torch.get_rng_state()
    texts = [generate(model, [2], max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_text_ends_before_the_stopping_token(model):
    text = generate(model, [2], max_new_tokens=20, seed=1)
    stop = text[7]
    assert generate(model, [2], max_new_tokens=20, seed=1, stop_id=stop) == text[: text.index(stop)]
    assert len(text) == 20
