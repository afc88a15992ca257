"""Drawing text: the likeliest token, the right distribution, and where it ends."""

import collections
import copy

import pytest
import torch

from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.model.generate import Generation, Text, generate, window_begin
from megagpt.model.gpt import GPT
from megagpt.model.sampling import Sampling
from megagpt.model.sampling import probabilities as cut
from megagpt.ops import load_ops
from megagpt.ops.precision import product_dtype

N = 1200  # draws
NOISE = 5 * (0.25 / N) ** 0.5


def spread_out(config: GPTConfig, kernels: str, *, seed: int, spread: float) -> GPT:
    """A new model whose weights are spread so far that its answers are not all alike."""
    torch.manual_seed(seed)
    model = GPT(config, load_ops(kernels, head_width=config.head_width, dtype=torch.float32, device="cpu")).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" not in name:
                p.add_(spread * torch.randn(p.shape))
    return model


@pytest.fixture(scope="module")
def model():
    config = GPTConfig(vocab_size=11, seq_len=6, n_layer=2, n_head=2, d_model=8)
    return spread_out(config, "torch", seed=6, spread=0.5)


def probabilities(model, ids, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([ids]))[0, -1] / temperature).softmax(0)


def drawn(model, ids, n=N, **options):
    """How often each token comes next."""
    counts = collections.Counter(generate(model, ids, max_new_tokens=1, seed=i, **options)[0] for i in range(n))
    return torch.tensor([counts[token] / n for token in range(11)])


# The first token seen of a text of 1, 2, ... 16 tokens where the model sees 6: moved by 3 when a seventh has come.
BEGINS = [0, 0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9, 12]


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "read anew"])
def test_at_temperature_zero_each_token_is_the_likeliest_given_the_last_ones(model, cache):
    """Also where the text is longer than what the model sees."""
    assert [window_begin(n, 6) for n in range(1, 17)] == BEGINS
    text = [3, 1]
    for _ in range(14):
        text.append(int(probabilities(model, text[BEGINS[len(text) - 1] :]).argmax()))
    assert generate(model, [3, 1], max_new_tokens=14, temperature=0, cache=cache) == text[2:]
    assert len(set(text)) > 3


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


# -- many texts at once


@pytest.fixture(scope="module", params=["pre", "post", "lstm"])
def any_model(request):
    kind = {"backbone": "lstm"} if request.param == "lstm" else {"norm": request.param}
    config = GPTConfig(vocab_size=50, seq_len=24, n_layer=2, n_head=2, d_model=16, **kind)
    return spread_out(config, "auto", seed=1, spread=0.3)


SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(seed=1),
    Sampling(temperature=0.7, top_k=5, seed=2),
    Sampling(top_p=0.6, seed=3),
    Sampling(top_p=0.6, top_p_rule="reference", temperature=1.3, seed=4),
    Sampling(temperature=0, repetition_penalty=1.5),
]


def six_texts():
    """Prompts of 1 to 24 tokens, the longest as long as the context; each is generated past it."""
    prompts = [[7], [1, 2, 3], list(range(24)), [9] * 5, [4, 4], list(range(20, 31))]
    return [
        Text(p, max_new_tokens=20 + 5 * i, sampling=s) for i, (p, s) in enumerate(zip(prompts, SAMPLINGS, strict=True))
    ]


def finish(generation, texts):
    while not all(text.finished for text in texts):
        generation.step()
    return [text.new for text in texts]


def alone(model, cache):
    found = []
    for text in six_texts():
        generation = Generation(model, cache=cache)
        generation.join(text)
        found += finish(generation, [text])
    return found


def test_texts_are_the_same_in_a_batch_or_alone_and_with_the_cache_or_without(any_model):
    expected = alone(any_model, cache=False)
    assert [len(new) for new in expected] == [20, 25, 30, 35, 40, 45]
    assert alone(any_model, cache=True) == expected
    for cache in (True, False):
        generation, texts = Generation(any_model, max_texts=6, cache=cache), six_texts()
        for text in texts:
            generation.join(text)
        assert finish(generation, texts) == expected


def test_texts_that_join_and_leave_between_steps_change_no_other(any_model):
    """A text that leaves gives its room to the last one, whose keys and values move with it."""
    expected = alone(any_model, cache=False)
    generation, texts = Generation(any_model, max_texts=3), six_texts()
    waiting, stranger = texts[1:], Text([5, 6], max_new_tokens=99, sampling=Sampling(seed=9))
    generation.join(stranger)
    generation.join(texts[0])
    for step in range(300):
        if step == 4:
            generation.leave(stranger)
        while waiting and generation.room:
            generation.join(waiting.pop(0))
        if not generation.step():
            break
    assert [text.new for text in texts] == expected
    assert len(stranger.new) == 4


def test_the_cache_never_grows(any_model):
    generation, texts = Generation(any_model, max_texts=6), six_texts()
    if generation._cache is None:
        pytest.skip("a recurrent model keeps no keys and values")
    for text in texts:
        generation.join(text)
    where = generation._cache.store.data_ptr()
    finish(generation, texts)
    assert generation._cache.store.data_ptr() == where
    assert generation._cache.store.shape == (2, 2, 6, 2, 24, 8)


@pytest.mark.parametrize("same_lengths", [True, False])
def test_what_the_cache_gives_is_what_the_whole_text_gives(any_model, same_lengths):
    """Logits and not only tokens, to rounding."""
    prompts = [[1, 2, 3], [4, 5, 6]] if same_lengths else [[1, 2, 3, 4, 5], [6]]
    generation = Generation(any_model, max_texts=2)
    texts = [Text(p, max_new_tokens=9, sampling=Sampling(temperature=0)) for p in prompts]
    for text in texts:
        generation.join(text)
    for _ in range(8):
        generation.step()
    with torch.inference_mode():
        found = generation._next_logits(texts)
        for text, logits in zip(texts, found, strict=True):
            whole = any_model(torch.tensor([text.ids]))[0, -1]
            assert (logits - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize("n", [1, 3])
def test_a_bfloat16_model_attends_in_what_the_cpu_multiplies_in(any_model, n):
    """Emulated, attention alone took longer than everything else."""
    model = copy.deepcopy(any_model).bfloat16()
    generation = Generation(model, max_texts=n)
    if generation._cache is not None:
        assert generation._cache.store.dtype == product_dtype(model.wte.weight)
    texts = [Text([4, 5, 6 + i][i:], max_new_tokens=9, sampling=Sampling(temperature=0)) for i in range(n)]
    for text in texts:
        generation.join(text)
    for _ in range(8):
        generation.step()
    with torch.inference_mode():
        for text, logits in zip(texts, generation._next_logits(texts), strict=True):
            whole = model(torch.tensor([text.ids]))[0, -1]
            assert logits.dtype == whole.dtype == torch.bfloat16
            assert (logits - whole).abs().max() < 0.03 * whole.abs().max()


def test_stop_ids_end_a_text_and_tell_why(model):
    whole = generate(model, [2], max_new_tokens=20, seed=1)
    text = Text([2], max_new_tokens=20, sampling=Sampling(seed=1), stop_ids=[whole[7], whole[9]])
    generation = Generation(model)
    generation.join(text)
    assert finish(generation, [text])[0] == whole[: min(whole.index(whole[7]), whole.index(whole[9]))]
    assert text.finished == "stop"
    assert generation.step() == []


# -- the choice of a token


def kept(logits, **options):
    return (cut(torch.tensor(logits), Sampling(**options)) > 0).nonzero()[:, 0].tolist()


def test_the_two_rules_of_the_nucleus_are_those_worked_out_by_hand():
    """Probabilities 0.5, 0.3, 0.15 and 0.05: the fewest that reach 0.6 are two, the most within it is one."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert kept(logits, top_p=0.6) == [1, 3]
    assert kept(logits, top_p=0.6, top_p_rule="reference") == [1]
    assert kept(logits, top_p=0.81, top_p_rule="reference") == [1, 3]
    assert kept(logits, top_p=0.81) == [0, 1, 3]
    for rule in ("smallest", "reference"):  # at least one, and all
        assert kept(logits, top_p=1e-9, top_p_rule=rule) == [1]
        assert kept(logits, top_p=1.0, top_p_rule=rule) == [0, 1, 2, 3]


def test_the_nucleus_is_of_what_top_k_leaves():
    """Of 0.5 and 0.3 the first has 0.625 of the probability: 0.6 is reached by it alone."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().tolist()
    assert kept(logits, top_p=0.6, top_k=2) == [1]
    assert kept([0.0, 1.0, 1.0, -1.0], top_k=1) == [1, 2]  # nothing is strictly below the first


@pytest.mark.parametrize("rule", ["smallest", "reference"])
def test_a_flat_distribution_of_a_large_vocabulary_is_cut_where_it_should(rule):
    logits = torch.linspace(0, 0.1, 5000)
    p = logits.double().softmax(0).flip(0).cumsum(0)
    n = int((p < 0.9).sum()) + (rule == "smallest")
    assert kept(logits.tolist(), top_p=0.9, top_p_rule=rule) == list(range(5000 - n, 5000))


def test_a_penalty_on_repetition_is_that_of_its_paper(model):
    """Positive logits are divided, negative ones multiplied, of every token in the text so far."""
    with torch.no_grad():
        logits = model(torch.tensor([[3, 1]]))[0, -1]
    expected = logits.clone()
    for token in (3, 1):
        expected[token] = logits[token] / 4 if logits[token] > 0 else logits[token] * 4
    text = Text([3, 1], max_new_tokens=1, sampling=Sampling(temperature=0, repetition_penalty=4.0))
    generation = Generation(model)
    generation.join(text)
    assert finish(generation, [text])[0] == [int(expected.argmax())]


BAD = {"top_k": -1, "top_p": 0.0, "temperature": -0.1, "repetition_penalty": 0.0, "seed": -1, "top_p_rule": "largest"}


@pytest.mark.parametrize("name", BAD)
def test_a_number_that_cannot_be_is_named(name):
    with pytest.raises(ConfigError, match=name):
        Sampling(**{name: BAD[name]})


def test_a_share_above_one_and_no_number_are_refused():
    for value in (1.01, float("nan")):
        with pytest.raises(ConfigError, match="top_p"):
            Sampling(top_p=value)


def test_a_prompt_that_the_model_cannot_see_whole_is_refused(model):
    with pytest.raises(ConfigError, match="7 tokens and the model's context 6"):
        generate(model, [1] * 7, max_new_tokens=1)
    with pytest.raises(ConfigError, match="empty prompt"):
        generate(model, [], max_new_tokens=1)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "read anew"])
def test_rows_of_the_table_that_no_text_has_are_never_drawn(model, cache):
    text = Text([2], max_new_tokens=40, sampling=Sampling(temperature=5.0))
    generation = Generation(model, vocab_size=4, cache=cache)
    generation.join(text)
    assert set(finish(generation, [text])[0]) == {0, 1, 2, 3}
