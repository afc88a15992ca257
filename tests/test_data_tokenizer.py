"""Tokenizers: the published vocabularies, trained ones, equal ids by whatever library, and hostile files."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from data_common import PARAGRAPHS
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.bpe import Training, parse_training, train
from megagpt.data.encode import Encoder, pieces
from megagpt.data.tokenizer import Tokenizer, from_file, load
from megagpt.data.vocabularies import definition
from megagpt.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def trained():
    return train(PARAGRAPHS * 20, parse_training("train:400"))


@pytest.fixture(scope="module")
def data():
    if "MEGAGPT_DATA" not in os.environ:
        pytest.skip("set MEGAGPT_DATA to the folder of the reference data")
    return Path(os.environ["MEGAGPT_DATA"])


def library_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    library = tokenizers.Tokenizer.from_str(tokenizer.json.decode())
    library.encode_special_tokens = True
    return library.encode(text, add_special_tokens=False).ids


def ids_of(encode: Encoder, text: str) -> list[int]:
    return [i for ids in encode(text) for i in ids]


def test_a_byte_level_vocabulary_gives_every_text_back(trained):
    for text in [*PARAGRAPHS, "\x00\x7f\u2028<|endoftext|>", "", " ", "\n\n"]:
        assert trained.decode(trained.encode(text)) == text
    assert (trained.vocab_size, trained.eot_id) == (400, 0)


def test_a_special_token_in_a_text_is_text(trained):
    assert trained.eot_id not in trained.encode("one<|endoftext|>two")
    assert trained.decode([trained.eot_id]) == "<|endoftext|>"


TRAIN = """
import sys
from megagpt.data.bpe import parse_training, train
print(train(sys.argv[2:], parse_training(sys.argv[1])).sha256)
"""


@pytest.mark.parametrize("spec", ["train:400", "train:400:wordend"])
def test_training_gives_the_same_tokenizer_in_any_process(spec):
    """The library's hash tables differ in every process, and with them the ids of characters at word ends did."""
    rare = [chr(0x4E00 + i) * 2 for i in range(400)]  # more than fit, and all of them as frequent
    texts = PARAGRAPHS * 3 + rare
    command = [sys.executable, "-c", TRAIN, spec, *texts]
    found = {subprocess.run(command, capture_output=True, text=True, timeout=60).stdout for _ in range(3)}
    assert found == {train(texts, parse_training(spec)).sha256 + "\n"}


@pytest.mark.parametrize("n", [257, 300, 1000])
@pytest.mark.parametrize("style", ["bytelevel", "wordend"])
def test_a_vocabulary_is_no_larger_than_asked_for(n, style):
    texts = ["".join(map(chr, range(0x4E00 + i, 0x4E00 + i + 40))) for i in range(0, 2000, 20)] + PARAGRAPHS
    tokenizer = train(texts, parse_training(f"train:{n}:{style}"))
    assert tokenizer.vocab_size <= n
    assert max(tokenizer.encode(" ".join(texts))) < n


def test_word_ends_mark_the_end_of_words_and_letters_are_lower_case():
    tokenizer = train(PARAGRAPHS * 20, parse_training("train:500:wordend"))
    assert tokenizer.decode(tokenizer.encode("The cat wasn't wet.")) == "the cat was n't wet ."
    assert tokenizer.eot_id is not None
    assert not Encoder(tokenizer).fast


@pytest.mark.parametrize("spec", ["train:", "train:1", "train:-5", "train:8k", "train:10000000", "train:500:wordends"])
def test_a_training_that_cannot_be_is_refused(spec):
    with pytest.raises(ConfigError, match="--tokenizer train:"):
        parse_training(spec)


def test_an_unknown_tokenizer_is_refused_with_what_is_known():
    with pytest.raises(DataError, match=r"'gpt3' is neither a file nor known; give gpt1, gpt2, train:N"):
        load("gpt3")
    with pytest.raises(DataError, match=r"put encoder\.json and vocab\.bpe|encoder_bpe_40000\.json and vocab_40000"):
        load("gpt1")


TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'sdm.a1 \u00a0\u3000")))


@given(texts=st.lists(TEXT, min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_fast_ids_are_those_of_the_library_for_any_text(trained, texts):
    encode = Encoder(trained)
    assert [ids_of(encode, text) for text in texts] == [library_ids(trained, text) for text in texts]
    assert encode.fast


def test_fast_ids_are_those_of_the_library_for_every_character():
    """Both libraries have their own tables of what a letter, a digit or a space is.

    The merges join each kind of neighbour to the first byte of whatever follows, so that a piece that ends elsewhere
    shows in the ids.
    """
    pytest.importorskip("tiktoken")
    from megagpt.data.encode import byte_alphabet

    characters = {byte: character for character, byte in byte_alphabet().items()}
    pairs = [(x, y) for x in b"a1. \n" for y in range(128, 256)] + [(y, x) for y in range(128, 192) for x in b"a1."]
    merges = [(characters[x], characters[y]) for x, y in pairs]
    names = [characters[byte] for byte in range(256)] + ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(definition({name: i for i, name in enumerate(names)}, merges, word_end=False), "test")
    encode = Encoder(tokenizer)
    assert encode.fast
    assigned = [c for c in map(chr, range(0x80, 0x110000)) if unicodedata.category(c) not in ("Cs", "Cn", "Co")]
    for character in random.Random(0).sample(assigned, 20_000):
        text = f"a{character}a1{character}1.{character}. {character}a  {character}\n{character} "
        assert ids_of(encode, text) == tokenizer.encode(text), hex(ord(character))


def test_merges_out_of_order_are_left_to_the_library():
    """tiktoken would merge by id: "ab" before "bc", though the list has "bc" first."""
    from megagpt.data.encode import byte_alphabet

    alphabet = list(byte_alphabet())
    vocab = {name: i for i, name in enumerate([*alphabet, "ab", "bc"])}
    tokenizer = Tokenizer(definition(vocab, [("b", "c"), ("a", "b")], word_end=False), "test")
    encode = Encoder(tokenizer)
    assert not encode.fast
    assert ids_of(encode, "abc") == [vocab["a"], vocab["bc"]]


def test_very_long_runs_of_one_character_are_encoded(trained):
    for text in (" " * 1_200_000 + "a", "a" * 100_000, "\n" * 50_000):
        assert trained.decode(ids_of(Encoder(trained), text)) == text


@given(
    words=st.lists(st.sampled_from(["a", "the", "x1", "é", "end.", "\n", "  ", "don't", "中文"]), max_size=60),
    size=st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_a_long_text_may_be_encoded_in_pieces(trained, words, size):
    text = " ".join(words)
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    if all(len(part) < 4 * size for part in parts):  # else a cut was forced
        assert [i for part in parts for i in trained.encode(part)] == trained.encode(text)


@pytest.mark.parametrize("kind", ["byte-level", "word ends", "spaces before", "spaces before the first", "words"])
def test_a_document_may_be_encoded_in_pieces_by_any_tokenizer(trained, kind):
    """A tokenizer of Llama's kind puts a space before all that it is given, so before each piece of a document."""
    text = "one two three two one two"
    others = {"byte-level": trained, "word ends": train(PARAGRAPHS, Training(300, "wordend"))}
    encode = Encoder(others.get(kind) or spaced(kind))
    parts = ["one two", " three two", " one", " two"]
    ids = [i for k, part in enumerate(parts) for ids in encode(part, begins=k == 0) for i in ids]
    assert ids == ids_of(encode, text)
    assert len(ids) >= 6


def spaced(kind: str) -> Tokenizer:
    """A vocabulary of whole words, with or without the space before them."""
    from tokenizers import models, normalizers, pre_tokenizers

    words = ["<unk>", *(mark + word for word in ("one", "two", "three") for mark in ("", "▁")), "▁▁one", "▁▁two"]
    library = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    if kind == "spaces before":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    elif kind == "spaces before the first":
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        library.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(library.to_str().encode(), kind)


def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path, trained):
    trained.save(tmp_path / "tokenizer.json")
    again = from_file(tmp_path / "tokenizer.json")
    assert (again.sha256, again.vocab_size, again.eot_id) == (trained.sha256, trained.vocab_size, trained.eot_id)


def test_what_a_tokenizer_would_add_to_a_text_is_left_out(tmp_path, trained):
    library = tokenizers.Tokenizer.from_str(trained.json.decode())
    library.post_processor = tokenizers.processors.TemplateProcessing(
        "<|endoftext|> $0", special_tokens=[("<|endoftext|>", 0)]
    )
    library.enable_padding(length=50)
    library.enable_truncation(3)
    library.save(str(tmp_path / "tokenizer.json"))
    assert from_file(tmp_path / "tokenizer.json").encode(PARAGRAPHS[0]) == trained.encode(PARAGRAPHS[0])


def test_vocab_and_merges_make_the_same_tokenizer(tmp_path, trained):
    model = trained.definition["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    loaded = load(str(tmp_path))
    assert loaded.eot_id == trained.eot_id
    for text in PARAGRAPHS:
        assert loaded.encode(text) == trained.encode(text)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def hostile(change):
    base = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
    base["model"] = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}
    change(base)
    return json.dumps(base).encode()


HOSTILE = {
    "an empty file": (b"", "not a tokenizer.json"),
    "no JSON": (b"{]", "not a tokenizer.json"),
    "a list": (b"[1]", "has no model"),
    "deep nesting": (b"[" * 200_000, "not a tokenizer.json"),
    "a bare vocabulary": (b'{"a": 0, "b": 1}', "looks like a bare vocabulary"),
    "no vocabulary": (hostile(lambda t: t["model"].pop("vocab")), "no vocabulary"),
    "an empty vocabulary": (hostile(lambda t: t["model"].update(vocab={})), "empty"),
    "two tokens of one id": (hostile(lambda t: t["model"].update(vocab={"a": 0, "b": 0})), "share an id"),
    "a huge id": (hostile(lambda t: t["model"].update(vocab={"a": 0, "b": 10**9 - 1})), "id 999,999,999"),
    "a negative id": (hostile(lambda t: t["model"].update(vocab={"a": 0, "b": -1})), "whole numbers"),
    "an id that is text": (hostile(lambda t: t["model"].update(vocab={"a": "0"})), "whole numbers"),
    "an added token of another id": (
        hostile(lambda t: t.update(added_tokens=[{"content": "a", "id": 1}])),
        "two ids",
    ),
    "an added token without id": (hostile(lambda t: t.update(added_tokens=["x"])), "no content and id"),
    "added tokens that are a number": (hostile(lambda t: t.update(added_tokens=5)), "added tokens are no list"),
    "an added token named by a list": (
        hostile(lambda t: t.update(added_tokens=[{"content": ["a"], "id": 5}])),
        "no content and id",
    ),
    "rules that are a list": (hostile(lambda t: t.update(pre_tokenizer=[1])), "the tokenizer failed"),
    "byte pairs without merges": (
        hostile(lambda t: (t.update(pre_tokenizer=BYTE_LEVEL), t["model"].pop("merges"))),
        "the tokenizer failed",
    ),
    "merges that are numbers": (
        hostile(lambda t: (t.update(pre_tokenizer=BYTE_LEVEL), t["model"].update(merges=[5]))),
        "the tokenizer failed",
    ),
    "an unknown model": (hostile(lambda t: t["model"].update(type="Nothing")), "the tokenizer failed"),
    "a merge of unknown tokens": (hostile(lambda t: t["model"].update(merges=[["x", "y"]])), "the tokenizer failed"),
    "not UTF-8": (b'{"model": "\xff"}', "not a tokenizer.json"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=f"tokenizer.json.*{message}"):
        ids_of(Encoder(from_file(tmp_path / "tokenizer.json")), "ab")


def test_a_panic_in_the_library_is_an_error_like_any_other(tmp_path):
    """A hostile pattern makes ``tokenizers`` panic, which is no Exception and would pass every handler."""

    def slow_pattern(t):
        split = {"type": "Split", "pattern": {"Regex": "(a+a+)+b"}, "behavior": "Isolated", "invert": False}
        t.update(pre_tokenizer=split)

    (tmp_path / "tokenizer.json").write_bytes(hostile(slow_pattern))
    tokenizer = from_file(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="the tokenizer failed"):
        tokenizer.encode("a" * 30)


def test_gpt2_ids_are_those_of_the_library(data):
    tokenizer = from_file(data / "gpt2_bpe" / "gpt2.json")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50_257, 50_256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    encode = Encoder(tokenizer)
    for text in ((data / "README.md").read_text(), *PARAGRAPHS):
        assert ids_of(encode, text) == library_ids(tokenizer, text)


def test_gpt1_words_are_those_its_vocabulary_was_made_of(data):
    tokenizer = load(str(data / "gpt1_bpe"))
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (40_478, None)
    text = "I don't think it's Mr. Smith's dog -- he can't... at 9 o'clock\n in the U.S. ☃"
    words = [tokenizer.exact.id_to_token(i) for i in tokenizer.encode(text)]
    expected = [
        *("i", "do", "n't", "think", "it", "'s", "mr.", "smith", "'s", "dog", "--"),
        *("he", "ca", "n't", "...", "at", "9", "o'clock", "\n", "in", "the", "u.s."),
    ]
    assert words == [*(f"{word}</w>" for word in expected), "<unk>"]
    assert tokenizer.encode("☃") == [0]


def test_names_of_vocabularies_are_looked_up_in_a_folder(data, tmp_path, monkeypatch):
    (tmp_path / "gpt1").symlink_to(data / "gpt1_bpe")
    monkeypatch.setenv("MEGAGPT_VOCAB", str(tmp_path))
    assert load("gpt1").sha256 == load(str(data / "gpt1_bpe")).sha256
