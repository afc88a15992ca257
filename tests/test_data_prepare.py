"""``megagpt prepare``: what becomes of the documents of an input."""

import json
import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest
from data_common import content, documents_of, prepare

from megagpt.data.indexed import IndexedDataset
from megagpt.data.main import data_main
from megagpt.data.stdlib_corpus import files
from megagpt.data.tokenizer import from_file

ENDINGS = (".bin", ".idx", ".json", ".tokenizer.json")


def test_a_corpus_holds_every_document_with_its_counts(tmp_path, texts, tokenizer, capsys):
    assert prepare("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    assert documents_of(tmp_path / "out") == texts
    info = IndexedDataset(tmp_path / "out").info
    assert info.n_words == sum(len(text.encode().split()) for text in texts)
    assert info.n_bytes == sum(len(text.encode()) for text in texts)
    assert info.tokenizer_sha256 == from_file(tokenizer).sha256
    assert "40 documents" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"input", *(f"out{ending}" for ending in ENDINGS)}
    assert data_main(["verify", str(tmp_path / "out")]) == 0


def test_megatrons_names_of_the_flags_make_the_same_corpus(tmp_path, texts, tokenizer):
    common = ("--input", tmp_path / "input", "--tokenizer", tokenizer)
    assert prepare(*common, "--output", tmp_path / "ours", "--json_key", "text") == 0
    assert prepare(*common, "--output-prefix", tmp_path / "theirs", "--json-keys", "text", "--append-eod") == 0
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


def test_the_number_of_processes_changes_nothing(tmp_path, texts, tokenizer):
    for workers in (1, 3):
        args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--workers", workers)
        assert prepare(*args, "--output", tmp_path / f"out{workers}") == 0
    assert content(tmp_path / "out1") == content(tmp_path / "out3")


def test_a_tokenizer_is_trained_on_the_input_when_asked_for(tmp_path, texts):
    assert prepare("--input", tmp_path / "input", "--tokenizer", "train:500", "--output", tmp_path / "out") == 0
    assert documents_of(tmp_path / "out") == texts
    assert IndexedDataset(tmp_path / "out").info.vocab_size > 300


def test_equal_documents_are_on_one_side_of_the_validation_split(tmp_path, tokenizer):
    documents = [f"Number {i % 50}." for i in range(100)]
    (tmp_path / "a.txt").write_text("\n".join(documents))
    args = ("--input", tmp_path / "a.txt", "--document", "line", "--tokenizer", tokenizer, "--valid_fraction", "0.3")
    assert prepare(*args, "--output", tmp_path / "out") == 0
    train_side, valid_side = documents_of(tmp_path / "out"), documents_of(tmp_path / "out-valid")
    assert sorted(train_side + valid_side) == sorted(documents)
    assert not set(train_side) & set(valid_side)
    assert 15 <= len(valid_side) <= 45


def test_a_long_file_is_one_document_on_one_side(tmp_path, tokenizer):
    """It is tokenised in pieces of a megabyte; their ids are those of the whole."""
    text = "".join(f"Line {i} of a long text, with words and numbers {i * i}.\n" for i in range(30_000))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "other.txt").write_text("Another document.")
    assert prepare("--input", tmp_path, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 2) == 0
    assert documents_of(tmp_path / "out") == [text, "Another document."]
    ids = IndexedDataset(tmp_path / "out").document(0)
    assert ids.tolist() == [*from_file(tokenizer).encode(text), 0]


def test_the_standard_library_is_the_embedded_corpus(tmp_path, tokenizer):
    assert prepare("--corpus", "python-stdlib", "--tokenizer", tokenizer, "--output", tmp_path / "out") == 0
    modules = [Path(path) for path in files()]
    dataset = IndexedDataset(tmp_path / "out")
    assert len(dataset) == len([path for path in modules if path.read_bytes().strip()])
    assert from_file(tokenizer).decode(dataset.document(0)[:-1]) == modules[0].read_text()
    assert not {"site-packages", "test", "tests"} & {part for path in modules for part in path.parts}
    assert Path(json.__file__) in modules


def test_the_same_command_twice_does_the_work_once(tmp_path, texts, tokenizer, capsys):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert prepare(*args) == 0
    before = (tmp_path / "out.bin").stat().st_mtime_ns
    assert prepare(*args) == 0
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before
    assert "up to date" in capsys.readouterr().out


def test_another_corpus_is_replaced_only_when_told_so(tmp_path, texts, tokenizer, capsys):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert prepare(*args) == 0
    before = content(tmp_path / "out")
    assert prepare(*args, "--json_key", "body") == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert content(tmp_path / "out") == before
    assert prepare(*args, "--json_key", "body", "--overwrite") == 0
    assert documents_of(tmp_path / "out") == ["x"] * 40


def test_a_validation_set_of_the_users_own_is_not_replaced(tmp_path, texts, tokenizer, capsys):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer)
    assert prepare(*args, "--output", tmp_path / "out-valid") == 0
    before = content(tmp_path / "out-valid")
    assert prepare(*args, "--output", tmp_path / "out", "--valid_fraction", "0.2") == 2
    assert re.search(r"out-valid\.bin exists and is not what .* --overwrite replaces it", capsys.readouterr().err)
    assert content(tmp_path / "out-valid") == before
    assert not (tmp_path / "out.bin").exists()


def test_a_corpus_that_was_damaged_is_not_up_to_date(tmp_path, texts, tokenizer):
    args = ("--input", tmp_path / "input", "--tokenizer", tokenizer, "--output", tmp_path / "out")
    assert prepare(*args) == 0
    before = content(tmp_path / "out")
    os.truncate(tmp_path / "out.bin", 100)
    assert prepare(*args) == 2
    assert prepare(*args, "--overwrite") == 0
    assert content(tmp_path / "out") == before


def test_gpt1_cleaning_and_shuffling_are_done_when_asked_for(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("One — two.  Three!! Four. Five. Six. Seven. Eight.\n\nNine")
    args = ("--input", tmp_path / "a.txt", "--tokenizer", tokenizer)
    assert prepare(*args, "--clean", "gpt1", "--output", tmp_path / "clean") == 0
    assert documents_of(tmp_path / "clean") == ["One - two. Three !! Four. Five. Six. Seven. Eight. \n Nine"]
    assert prepare(*args, "--shuffle_sentences", "--output", tmp_path / "mixed") == 0
    assert sorted(documents_of(tmp_path / "mixed")[0].split()) == sorted((tmp_path / "a.txt").read_text().split())
    assert IndexedDataset(tmp_path / "clean").info.n_bytes == (tmp_path / "a.txt").stat().st_size


@pytest.mark.skipif("MEGAGPT_DATA" not in os.environ, reason="set MEGAGPT_DATA to the folder of the reference data")
def test_real_books_get_the_ids_of_the_library(tmp_path):

    data = Path(os.environ["MEGAGPT_DATA"])
    source, vocabulary = data / "books" / "books-valid.jsonl.xz", data / "gpt2_bpe" / "gpt2.json"
    assert prepare("--input", source, "--tokenizer", vocabulary, "--output", tmp_path / "out") == 0
    dataset = IndexedDataset(tmp_path / "out")
    with lzma.open(source) as lines:
        books = [json.loads(line)["text"] for line in lines]
    assert len(books) == len(dataset) == 23
    library = from_file(vocabulary)
    for i in (0, 11, 22):
        assert np.array_equal(dataset.document(i), [*library.encode(books[i]), 50_256])
    assert dataset.info.n_words == 1_521_912
    assert dataset.info.n_bytes == sum(len(book.encode()) for book in books)
