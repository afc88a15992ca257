"""``megagpt generate``: text from saved weights and the tokenizer beside them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megagpt.data.bpe import parse_training, train
from megagpt.data.tokenizer import from_file
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.evaluate.main import generate_main
from megagpt.evaluate.prompts import PRESETS, first_sentences
from megagpt.evaluate.source import find_tokenizer
from megagpt.evaluate.text import TextStream, complete
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


def test_an_interrupted_text_ends_its_line(run, capsys, monkeypatch):
    """What the shell says next stood behind the text."""

    def interrupted(*arguments):
        yield next(complete(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr("megagpt.evaluate.text.complete", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_main(["--from", str(run), "--prompt", "It was", "--max_tokens", "9"])
    shown = capsys.readouterr().out
    assert shown.startswith("It was")
    assert shown.endswith("\n")


def streamed(tokenizer, prompt, new, stop=()):
    """The pieces in which the text behind ``prompt`` is given out when tokens come one by one."""
    stream = TextStream(tokenizer, prompt, stop)
    return [*(stream.push([token]) for token in new), stream.close()]


def test_words_of_a_word_end_vocabulary_stay_apart():
    """Text and prompt were decoded apart, and the space between their words was lost."""
    text = "it was a dark night"
    tokenizer = train([f"{text}. "] * 50, parse_training("train:300:wordend"))
    ids, new = tokenizer.encode("It was"), tokenizer.encode("a dark night")
    assert "It was" + "".join(streamed(tokenizer, ids, new)) == "It was a dark night"
    assert "".join(streamed(tokenizer, [tokenizer.eot_id], new)) == "a dark night"


@pytest.mark.parametrize("text", ["plain words", "déjà vu — 東京 👍🏽!", "\ufffd\ufffd", "", " \n "])
def test_what_is_given_out_in_pieces_is_the_whole_text_and_no_half_character(tmp_path, text):
    """A token here is a byte, and most of these characters are several."""
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    tokenizer = from_file(tmp_path / "tokenizer.json")
    prompt, new = tokenizer.encode("né "), tokenizer.encode(text)
    pieces = streamed(tokenizer, prompt, new)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["tw"], "one "),
        ("one two three", ["three", "wo t"], "one t"),
        ("aab aaab", ["aaab"], "aab "),
        ("one tw", ["two"], "one tw"),
        ("stop", ["stop"], ""),
    ],
)
def test_a_text_ends_before_the_first_of_its_stop_strings(tmp_path, text, stop, expected):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str())
    tokenizer = from_file(tmp_path / "tokenizer.json")
    pieces = streamed(tokenizer, tokenizer.encode("x"), tokenizer.encode(text), stop)
    assert "".join(pieces) == expected
    assert not any(piece.endswith("tw") for piece in pieces[:-1])  # it may begin a stop string


def test_a_seed_fixes_the_text_and_samples_differ(run, capsys):
    arguments = ("--from", run, "--prompt", "It", "--max_tokens", "12")
    first = generated(capsys, *arguments, "--seed", "3")
    assert generated(capsys, *arguments, "--seed", "3") == first
    assert generated(capsys, *arguments, "--seed", "4") != first


def test_at_temperature_zero_every_sample_is_the_likeliest(run, capsys):
    arguments = ("--from", run, "--prompt", "It", "--max_tokens", "8", "--temperature", "0")
    assert generated(capsys, *[{"--max_tokens": "--max_new_tokens"}.get(a, a) for a in arguments]) == generated(
        capsys, *arguments
    )
    once = generated(capsys, *arguments)
    assert generated(capsys, *arguments, "--num_samples", "2", "--seed", "9") == once + once


def test_without_a_prompt_a_document_begins(run, capsys):
    assert generated(capsys, "--from", run, "--max_tokens", "20").strip()


@pytest.mark.parametrize("flag", ["--max_tokens", "--num_samples", "--temperature", "--top_k"])
def test_a_number_out_of_range_names_its_flag(run, flag):
    with pytest.raises(ConfigError, match=f"{flag} -1"):
        generate_main(["--from", str(run), flag, "-1"])


FOREIGN = {
    "a pickle": ("pytorch_model.bin", "pytorch_model.bin holds weights as a pickle"),
    "a folder with a pickle": ("pytorch_model.bin", "holds weights as a pickle .*weights_only=True"),
    "GPT-1 as it was released": ("params_shapes.json", "is a model as OpenAI released GPT-1; .* megagpt import"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_model_of_others_is_refused_with_the_way_to_it(tmp_path, case):
    """Of each was said that it holds no checkpoint."""
    name, message = FOREIGN[case]
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(CheckpointError, match=message):
        generate_main(["--from", str(tmp_path / name if case == "a pickle" else tmp_path)])


def test_the_weights_of_a_folder_of_others_alone_say_to_give_the_folder(tmp_path, run):
    with safe_open(run, framework="pt") as file:
        save_file({name: file.get_tensor(name) for name in file.keys()}, tmp_path / "model.safetensors")  # noqa: SIM118
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"does not say which model .*give its folder, {tmp_path}"):
        generate_main(["--from", str(tmp_path / "model.safetensors")])


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


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/global_step5", "model.safetensors"])
def test_the_tokenizer_is_that_of_the_run_folder_whatever_of_it_is_named(tmp_path, place):
    """It was missed beside the folder of the checkpoints."""
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / "tokenizer.json").touch()
    assert find_tokenizer(str(tmp_path / place)) == tmp_path / "tokenizer.json"


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, run):
    larger = byte_tokenizer()
    larger.add_tokens(["one", "two"])
    path = tmp_path / "tokenizer.json"
    path.write_text(larger.to_str())
    with pytest.raises(ConfigError, match="259 tokens and the model 257"):
        generate_main(["--from", str(run), "--tokenizer", str(path), "--prompt", "x"])


def test_weights_of_another_shape_are_one_clear_error(tmp_path, run, capsys):
    """Before anything of the answer: the error stood behind the prompt, in the same line."""
    config = GPTConfig(vocab_size=257, seq_len=16, n_layer=1, n_head=2, d_model=16)
    weights = tmp_path / "model.safetensors"
    save_file({"wte.weight": torch.zeros(257, 16)}, weights, metadata={"config": json.dumps(config.to_dict())})
    (tmp_path / "tokenizer.json").symlink_to(run.with_name("tokenizer.json"))
    with pytest.raises(CheckpointError, match="does not hold the weights"):
        generate_main(["--from", str(weights), "--prompt", "x"])
    assert capsys.readouterr().out == ""


# -- files of prompts, presets, prompts one after the other


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_to_a_file_are_those_to_its_prompts_alone(run, tmp_path, capsys):
    """Whatever the batch: each answer has its own seed, and its own keys come along."""
    prompts = ["It was", "A", "longer prompt", "x"]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": i, "prompt": p}) + "\n" for i, p in enumerate(prompts))
    )
    files = ["--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    alone = [
        generated(capsys, "--from", run, "--prompt", p, "--max_tokens", 25, "--seed", 7 + i).rstrip("\n")
        for i, p in enumerate(prompts)
    ]
    for batch_size in (1, 3):
        generated(capsys, "--from", run, *files, "--max_tokens", 25, "--seed", 7, "--batch_size", batch_size)
        answers = lines_of(tmp_path / "out.jsonl")
        assert [a["prompt"] + a["text"].rstrip("\n") for a in answers] == alone
        assert [a["id"] for a in answers] == [0, 1, 2, 3]
        assert all((a["finish"] == "length" and a["tokens"] == 25) or a["finish"] == "stop" for a in answers)


def test_the_cache_changes_no_text(run, capsys):
    arguments = ("--from", run, "--prompt", "It was", "--max_tokens", "40", "--top_p", "0.9", "--num_samples", "3")
    assert generated(capsys, *arguments) == generated(capsys, *arguments, "--no_cache")


def test_in_16_bits_a_text_comes_too(run, capsys):
    arguments = ("--from", run, "--prompt", "It was", "--max_tokens", "9", "--temperature", "0", "--dtype", "bf16")
    assert generated(capsys, *arguments) == generated(capsys, *arguments, "--no_cache")


def test_a_stop_string_ends_the_text(run, capsys):
    arguments = ("--from", run, "--prompt", "It was", "--max_tokens", "30", "--seed", "5")
    whole = generated(capsys, *arguments)
    stop = whole[10:12]
    assert generated(capsys, *arguments, "--stop", stop) == whole[: whole.index(stop, len("It was"))] + "\n"


def test_prompts_are_answered_one_after_the_other(run, capsys, monkeypatch):
    """One that is too long, or typed in another encoding, is told and the next is asked for."""
    lines = iter(["It was", "this is longer than the context", "caf\udce9", "A", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert generate_main(["--from", str(run), "--interactive", "--max_tokens", "3"]) == 0
    found = capsys.readouterr()
    assert found.out.startswith("It was")
    assert "31 tokens and the model's context 16" in found.err
    assert "no Unicode" in found.err
    assert "\nA" in found.out


def test_the_prompts_of_the_presets_are_those_of_the_paper():
    pairs = [("good", "bon"), ("day", "jour")]
    assert PRESETS["summary"].prompt("An article.\n", "", []) == "An article.\nTL;DR:"
    assert (PRESETS["summary"].max_tokens, PRESETS["summary"].top_k, PRESETS["summary"].sentences) == (100, 2, 3)
    assert PRESETS["translation"].prompt("night", "", pairs) == "good = bon\nday = jour\nnight ="
    asked = PRESETS["question"].prompt("Who?", "It was Jane.\n", [("Where?", "Here.")])
    assert asked == "It was Jane.\nQ: Where?\nA: Here.\nQ: Who?\nA:"
    assert {PRESETS[name].temperature for name in ("translation", "question")} == {0.0}


def test_sentences_end_where_a_reader_ends_them():
    text = ' He said "no." Then 3.5 men left! Why? Nobody knew.'
    assert first_sentences(text, 1) == 'He said "no."'
    assert first_sentences(text, 3) == 'He said "no." Then 3.5 men left! Why?'
    assert first_sentences("no end", 3) == "no end"


def test_a_preset_answers_without_the_prompt(run, tmp_path, capsys):
    (tmp_path / "pairs.tsv").write_text("a\tb\n")
    preset = ("--preset", "translation", "--examples", tmp_path / "pairs.tsv")
    text = generated(capsys, "--from", run, *preset, "--prompt", "c", "--max_tokens", "5")
    put = "a = b\nc ="
    plain = generated(capsys, "--from", run, "--prompt", put, "--max_tokens", "5", "--temperature", "0")
    assert plain.startswith(put)
    assert text.strip() == first_sentences(plain[len(put) :], 1)


BAD_FLAGS = {
    "top_p": (["--top_p", "0"], ConfigError, "--top_p 0.0 must be above 0"),
    "temperature": (["--temperature", "nan"], ConfigError, "--temperature nan"),
    "penalty": (["--repetition_penalty", "-1"], ConfigError, "--repetition_penalty"),
    "stop": (["--stop", ""], ConfigError, "empty text"),
    "two prompts": (["--prompt", "x", "--interactive"], ConfigError, "give one"),
    "no output": (["--prompts", "x.jsonl"], ConfigError, "go together"),
    "examples": (["--examples", "x.tsv"], ConfigError, "--preset translation or question"),
    "too long": (["--prompt", "x" * 17], ConfigError, "17 tokens and the model's context 16"),
    "no Unicode": (["--prompt", "\udce9"], DataError, "no Unicode; write it in UTF-8"),  # a byte of the command line
    "no file": (
        ["--preset", "question", "--context", "none.txt"],
        ConfigError,
        "none.txt cannot be read: No such file",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_what_cannot_be_asked_is_told(run, case):
    flags, error, message = BAD_FLAGS[case]
    with pytest.raises(error, match=message):
        generate_main(["--from", str(run), *flags])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n\nno JSON', "line 3 is not JSON"),
        ('{"prompt": "a", "n": NaN}', "line 1 is not JSON: NaN"),  # which the answers' line would repeat
        ('\ufeff{"text": "a"}', "line 1 is no object"),
        ('{"prompt": "a"}\n{"prompt": "this is longer than the context"}', "prompt 2 .* the model's context 16"),
    ],
    ids=["empty", "no JSON", "nan", "no prompt", "too long"],
)
def test_a_file_of_prompts_that_cannot_be_used_writes_nothing(run, tmp_path, content, message):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        generate_main(
            ["--from", str(run), "--prompts", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
        )
    assert not (tmp_path / "out.jsonl").exists()


def test_another_tokenizer_than_that_of_the_training_is_refused(tmp_path, run):
    with safe_open(run, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
        about = {**file.metadata(), "tokenizer_sha256": "1" * 64}
    save_file(weights, tmp_path / "model.safetensors", metadata=about)
    (tmp_path / "tokenizer.json").symlink_to(run.with_name("tokenizer.json"))
    with pytest.raises(DataError, match="another one"):
        generate_main(["--from", str(tmp_path / "model.safetensors"), "--prompt", "x"])
