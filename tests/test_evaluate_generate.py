"""``megagpt generate``: text from saved weights and the tokenizer beside them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megagpt.data.bpe import parse_training, train
from megagpt.errors import CheckpointError, ConfigError
from megagpt.evaluate.main import continuation, generate_main
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops


def byte_tokenizer():
    """A tokenizer of 256 bytes and an end of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the weights of an untrained model and its tokenizer; the weights' path."""
    folder = tmp_path_factory.mktemp("run")
    config = GPTConfig(vocab_size=257, seq_len=16, n_layer=2, n_head=2, d_model=16)
    torch.manual_seed(0)
    model = GPT(config, load_ops("torch", head_width=8, dtype=torch.float32, device="cpu"))
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"config": json.dumps(config.to_dict())})
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    return folder / "model.safetensors"


def generated(capsys, *arguments):
    assert generate_main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def test_the_text_begins_with_the_prompt_and_goes_on(run, capsys):
    text = generated(capsys, "--from", run, "--prompt", "It was", "--max_tokens", "30")
    assert text.startswith("It was")
    assert len(text) > len("It was\n")


def test_words_of_a_word_end_vocabulary_stay_apart():
    """Text and prompt were decoded apart, and the space between their words was lost."""
    text = "it was a dark night"
    tokenizer = train([f"{text}. "] * 50, parse_training("train:300:wordend"))
    ids, new = tokenizer.encode("It was"), tokenizer.encode("a dark night")
    assert "It was" + continuation(tokenizer, ids, new) == "It was a dark night"
    assert continuation(tokenizer, [tokenizer.eot_id], new) == "a dark night"


def test_a_seed_fixes_the_text_and_samples_differ(run, capsys):
    arguments = ("--from", run, "--prompt", "It", "--max_tokens", "12")
    first = generated(capsys, *arguments, "--seed", "3")
    assert generated(capsys, *arguments, "--seed", "3") == first
    assert generated(capsys, *arguments, "--seed", "4") != first


def test_at_temperature_zero_every_sample_is_the_likeliest(run, capsys):
    arguments = ("--from", run, "--prompt", "It", "--max_tokens", "8", "--temperature", "0")
    once = generated(capsys, *arguments)
    assert generated(capsys, *arguments, "--num_samples", "2", "--seed", "9") == once + once


def test_without_a_prompt_a_document_begins(run, capsys):
    assert generated(capsys, "--from", run, "--max_tokens", "20").strip()


@pytest.mark.parametrize("flag", ["--max_tokens", "--num_samples", "--temperature", "--top_k"])
def test_a_number_out_of_range_names_its_flag(run, flag):
    with pytest.raises(ConfigError, match=f"{flag} -1"):
        generate_main(["--from", str(run), flag, "-1"])


@pytest.mark.parametrize("tokenizer", [True, False], ids=["with a tokenizer", "without"])
def test_a_run_that_is_not_there_is_one_clear_error(tmp_path, run, tokenizer):
    """Without a tokenizer it was missing the tokenizer's file in a folder that is missing."""
    flags = ["--tokenizer", str(run.with_name("tokenizer.json"))] if tokenizer else []
    with pytest.raises(CheckpointError, match="nowhere"):
        generate_main(["--from", str(tmp_path / "nowhere"), "--prompt", "x", *flags])


def test_a_run_without_a_tokenizer_says_what_to_give(tmp_path, run):
    (tmp_path / "a" / "b").mkdir(parents=True)
    weights = tmp_path / "a" / "b" / "model.safetensors"
    weights.symlink_to(run)
    with pytest.raises(ConfigError, match="--tokenizer PATH"):
        generate_main(["--from", str(weights), "--prompt", "x"])


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, run):
    larger = byte_tokenizer()
    larger.add_tokens(["one", "two"])
    path = tmp_path / "tokenizer.json"
    path.write_text(larger.to_str())
    with pytest.raises(ConfigError, match="259 tokens and the model 257"):
        generate_main(["--from", str(run), "--tokenizer", str(path), "--prompt", "x"])


def test_weights_of_another_shape_are_one_clear_error(tmp_path, run):
    config = GPTConfig(vocab_size=257, seq_len=16, n_layer=1, n_head=2, d_model=16)
    weights = tmp_path / "model.safetensors"
    save_file({"wte.weight": torch.zeros(257, 16)}, weights, metadata={"config": json.dumps(config.to_dict())})
    (tmp_path / "tokenizer.json").symlink_to(run.with_name("tokenizer.json"))
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        generate_main(["--from", str(weights), "--prompt", "x"])
