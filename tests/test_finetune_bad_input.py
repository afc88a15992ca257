"""Whatever a user gets wrong in fine-tuning is one sentence with exit code 2 or 3, and nothing is written."""

import json
from pathlib import Path

import pytest
import torch
from corpora import write_bytes_corpus
from distributed import finetune
from finetune_common import ds_config, pretrained, write_csv
from safetensors.torch import load_file, save_file

from megagpt.cli import main as megagpt
from megagpt.finetune.main import main
from megagpt.train.main import main as train
from megagpt.train.manifest import open_safetensors


def arguments(home: Path, **changes) -> list[str]:
    flags = {
        "ds_config": ds_config(home),
        "train": write_csv(home / "train.csv", 40),
        "valid": write_csv(home / "valid.csv", 10, 1),
        "init_from": pretrained(),
        "run_dir": home / "run",
        "global_batch_size": 8,
        **changes,
    }
    return [str(w) for name, value in flags.items() if value is not None for w in (f"--{name}", value)]


def table(home: Path, name: str, *rows: str) -> Path:
    (home / name).write_text("\n".join(rows) + "\n")
    return home / name


def without_tokenizer(home: Path) -> Path:
    (home / "lost").mkdir()
    (home / "lost" / "gpt.safetensors").write_bytes(pretrained().read_bytes())
    return home / "lost" / "gpt.safetensors"


def other_tokenizer(home: Path) -> Path:
    path = without_tokenizer(home)
    text = (pretrained().parent / "tokenizer.json").read_text()
    (path.parent / "tokenizer.json").write_text(text + "\n")
    return path


def short_model(home: Path) -> Path:
    return pretrained("post", seq_len=6)


def choices(home: Path, *counts: int) -> dict:
    """Files of questions with so many choices, one after the other."""
    rows = [json.dumps({"text": "who", "c": ["a man"] * n, "label": 0}) for n in counts]
    return {"train": table(home, "q.jsonl", *rows), "valid": home / "q.jsonl", "kind": "choose", "choice_column": "c"}


def two_texts(home: Path) -> dict:
    rows = [f"some words,other words,{'ab'[i % 2]}" for i in range(20)]
    path = table(home, "pairs.csv", "premise,hypothesis,label", *rows)
    return {"train": path, "valid": path, "kind": "entail"}


CASES = {
    "unknown task": (lambda h: {"train": None, "valid": None, "task": "sst", "task_data": h}, "did you mean 'sst2'"),
    "task and files": (lambda h: {"task": "sst2"}, "give either --task"),
    "task without files": (lambda h: {"train": None, "valid": None, "task": "sst2"}, "--task sst2 needs --task_data"),
    "no validation": (lambda h: {"valid": None}, "--train needs --valid"),
    "unknown kind": (
        lambda h: {"kind": "clasify"},
        "--kind 'clasify' is unknown (did you mean 'classify'?); choose one of",
    ),
    "choices of unequal number": (
        lambda h: {**choices(h, 2, 2, 3), "n_choices": 2},
        "q.jsonl:3: 3 choices where every example must have 2",
    ),
    "one choice": (lambda h: choices(h, 2, 1), "q.jsonl:2: 1 choice where at least 2 are needed"),
    "number of choices of a class": (lambda h: {"n_choices": 2}, "--n_choices is for your own files of --kind choose"),
    "unknown column": (lambda h: {"text_column": "txt"}, "text"),
    "one text where two are needed": (lambda h: {"kind": "entail"}, "names 1 columns; kind entail has 2"),
    "misspelt second column": (lambda h: {**two_texts(h), "text_column": "premise,hypothesys"}, "hypothesis"),
    "label of valid unknown in train": (
        lambda h: {"valid": table(h, "v.csv", "text,label", "good one,plus", "bad one,zero")},
        "zero",
    ),
    "one class only": (lambda h: {"train": table(h, "t.csv", "text,label", *["good one,plus"] * 20)}, "the same label"),
    "no rows": (lambda h: {"train": table(h, "t.csv", "text,label")}, "t.csv"),
    "all rows bad": (lambda h: {"train": table(h, "t.csv", "text,label", *["a,b,c,d"] * 9)}, "t.csv"),
    "NaN as target": (
        lambda h: {"kind": "regress", "train": table(h, "t.csv", "text,label", "a b,1.5", "c d,nan", "e f,2")},
        "nan",
    ),
    "too few examples for a batch": (
        lambda h: {"train": write_csv(h / "few.csv", 6)},
        "6 training examples are less than one batch of 8; lower --global_batch_size",
    ),
    "context too short": (lambda h: {"init_from": short_model(h)}, "reads 6 tokens and a task needs at least 8"),
    "longer than the model": (lambda h: {"seq_len": 999}, "--seq_len 999 is more than the 32 positions"),
    "more blocks than there are": (lambda h: {"n_transfer": 4}, "--n_transfer 4 is more than the model's 3 blocks"),
    "unknown recipe": (lambda h: {"recipe": "gpt2"}, "did you mean 'gpt1'"),
    "unknown head": (lambda h: {"head": "liner"}, "did you mean 'linear'"),
    "unknown schedule": (lambda h: {"schedule": "stl"}, "did you mean 'stlr'"),
    "no learning": (lambda h: {"lr": 0}, "--lr 0 must be above 0"),
    "documents without pooling": (lambda h: {"document_tokens": 99, "head": "linear"}, "use --head pooled_mlp"),
    "documents in pairs": (
        lambda h: {**two_texts(h), "text_column": "premise,hypothesis", "document_tokens": 99},
        "--document_tokens is for one text an example",
    ),
    "gradients of windows that there are not": (lambda h: {"gradient_windows": 2}, "--gradient_windows is for long"),
    "mix with a language model": (lambda h: {"head": "scalar_mix"}, "add --lm_coef 0"),
    "seeds that are none": (lambda h: {"seeds": "1,b"}, "no list of whole numbers"),
    "fraction of nothing": (lambda h: {"limit_train": 0}, "--limit_train 0 must be above 0"),
    "rate in the DeepSpeed file": (
        lambda h: {"ds_config": ds_config(h, 1, optimizer={"type": "AdamW", "params": {"lr": 0.1}})},
        "optimizer.params.lr is the recipe's to say",
    ),
    "no tokenizer": (lambda h: {"init_from": without_tokenizer(h)}, "lost has no tokenizer.json"),
    "another tokenizer": (lambda h: {"init_from": other_tokenizer(h)}, "is another tokenizer than the one"),
    "misspelt flag": (lambda h: {"tain": 1}, "unknown flag --tain (did you mean '--train'?)"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_sentence_with_exit_code_2_and_nothing_is_written(case, tmp_path, capfd):
    changes, words = CASES[case]
    code = main(arguments(tmp_path, **changes(tmp_path)))
    said = capfd.readouterr().err
    assert code == 2, said
    assert words in said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished fine-tuning run."""
    home = tmp_path_factory.mktemp("finished")
    assert finetune(arguments(home, epochs=1))[0] == [0]
    return home / "run"


def no_model(home: Path) -> Path:
    save_file({"wte.weight": torch.zeros(2, 2)}, home / "x.safetensors")
    return home / "x.safetensors"


def cut_model(home: Path) -> Path:
    with open_safetensors(pretrained(), framework="pt") as file:
        about = file.metadata()
    weights = load_file(pretrained())
    del weights["blocks.1.attn.qkv.weight"]
    save_file(weights, home / "x.safetensors", metadata=about)
    return home / "x.safetensors"


WEIGHTS = {
    "nothing there": (lambda h, run: h / "x.safetensors", "cannot read weights from"),
    "no run": (lambda h, run: h, "holds no checkpoint"),
    "no model": (lambda h, run: no_model(h), "does not say which model its weights are of"),
    "a part": (
        lambda h, run: cut_model(h),
        "blocks.1.attn.qkv.weight should have the shape (96, 32) and there",
    ),
    "fine-tuned run": (lambda h, run: run, "is fine-tuned already; give the pre-trained run"),
    "fine-tuned weights": (lambda h, run: run / "model.safetensors", "is fine-tuned already; give the"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_cannot_be_used_are_told_before_anything_is_written(case, tmp_path, finished, capfd):
    source, words = WEIGHTS[case]
    (tmp_path / "tokenizer.json").write_bytes((pretrained().parent / "tokenizer.json").read_bytes())
    capfd.readouterr()
    code = main(arguments(tmp_path, init_from=source(tmp_path, finished)))
    said = capfd.readouterr().err
    assert code == 3, said
    assert words in said
    assert said.count("error:") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_fine_tuned_model_is_no_start_of_pre_training_and_writes_no_text(command, tmp_path, finished, capfd):
    if command == "generate":
        code = megagpt(["generate", "--from", str(finished), "--prompt", "time"])
    else:
        write_bytes_corpus(tmp_path / "corpus", [b"text " * 50])
        flags = ["--ds_config", ds_config(tmp_path), "--data", tmp_path / "corpus", "--init_from", finished]
        code = train([str(word) for word in [*flags, "--run_dir", tmp_path / "run", "--max_steps", 1]])
    said = capfd.readouterr().err
    assert code == 3, said
    assert "is fine-tuned already" in said
    assert not (tmp_path / "run").exists()


def test_text_of_another_task_is_not_resumed(finished):
    before = sorted(p.name for p in finished.rglob("*"))
    home = finished.parent
    codes, output = finetune(arguments(home, epochs=1, train=write_csv(home / "other.csv", 40, 9)))
    assert codes == [2], output
    assert "is of other data" in output
    assert sorted(p.name for p in finished.rglob("*")) == before
    assert json.loads((finished / "run.json").read_text())["task"] == home.name


def test_pre_training_data_are_no_task(tmp_path, capfd):
    write_bytes_corpus(tmp_path / "corpus", [b"text " * 50])
    assert main(arguments(tmp_path, train=tmp_path / "corpus.bin")) == 2
    assert "corpus.bin" in capfd.readouterr().err
