"""Every kind of task, head and recipe learns a small task that can be learnt.

The model reads 96 tokens, so that no text is cut: a quarter of them is what a choice may have. Epochs are few and long,
for each ends with an evaluation and a checkpoint.
"""

import csv
import json
import random
from pathlib import Path

import pytest
from distributed import run_ranks
from finetune_common import ds_config, pretrained, train_all
from safetensors.torch import load_file, save_file

from megagpt.train.manifest import open_safetensors

FILLER = ("time", "man", "thing", "day", "no", "other")
ORDER = ("time", "man", "thing", "day", "no", "other")  # words that stand for 0 to 5
N_TRAIN, N_VALID = 1024, 160


def words(rng: random.Random, *keys: str) -> str:
    found = [rng.choice(FILLER) for _ in range(rng.randint(0, 2))]
    for key in keys:
        found.insert(rng.randrange(len(found) + 1), key)
    return " ".join(found)


def row(kind: str, rng: random.Random) -> dict:
    key = rng.choice(("good", "bad"))
    if kind == "classify":
        return {"text": words(rng, key), "label": key}
    if kind == "short":  # so few texts that a frozen decoder's states of them are separable by a plane
        return {"text": f"{rng.choice(('', *FILLER))} {key}", "label": key}
    if kind == "entail":  # the first text says the same or the opposite by chance
        return {"a": words(rng, rng.choice(("good", "bad"))), "b": words(rng, key), "label": key}
    if kind == "similar":
        return {"a": words(rng, key), "b": words(rng, key), "label": key}
    if kind == "choose":
        right = rng.randrange(2)
        choices = {f"c{k}": words(rng, "good" if k == right else "bad") for k in range(2)}
        return {"text": words(rng, "way"), **choices, "label": right}
    if kind == "multilabel":
        names = [name for name in ("good", "bad", "way") if rng.random() < 0.5]
        return {"text": words(rng, "people", *names), "label": "|".join(names)}
    if kind == "hierarchy":  # some texts say which good or bad it is
        path = rng.choice(("good", "good/way", "good/people", "bad", "bad/own"))
        return {"text": words(rng, *path.split("/")), "label": path}
    n = rng.randint(0, 4)
    return {"text": words(rng, "people", *["good"] * n), "label": 10 + 5 * n}


def write(path: Path, kind: str, n: int, seed: int) -> Path:
    rng = random.Random(seed)
    rows = [row(kind, rng) for _ in range(n)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_stsb(home: Path) -> Path:
    """STS-B's files with scores between 0 and 5, each the mean of what its two texts say."""
    header = [*"012345", "source", "sentence1", "sentence2", "score"]
    (home / "STS-B").mkdir()
    for name, n in (("train", N_TRAIN), ("dev", N_VALID)):
        rng = random.Random(n)
        lines = ["\t".join(header)]
        for i in range(n):
            a, b = rng.randrange(6), rng.randrange(6)
            lines.append("\t".join([str(i), *"xxxxxx", ORDER[a], ORDER[b], f"{(a + b) / 2:.3f}"]))
        (home / "STS-B" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return home


def loud(home: Path) -> Path:
    """A pre-trained model whose blocks say something: weights of the first step are too small for a frozen decoder."""
    with open_safetensors(pretrained("pre", seq_len=96), framework="pt") as file:
        about = file.metadata()
    weights = {k: v * 6 if v.dim() == 2 else v for k, v in load_file(pretrained("pre", seq_len=96)).items()}
    (home / "tokenizer.json").write_bytes((pretrained("pre", seq_len=96).parent / "tokenizer.json").read_bytes())
    save_file(weights, home / "gpt.safetensors", metadata=about)
    return home / "gpt.safetensors"


KINDS = ("classify", "entail", "similar", "choose", "multilabel", "hierarchy", "regress")
KIND_OF = {"hierarchy": "multilabel", "short": "classify"}
EPOCHS = {"entail": 3, "multilabel": 6, "hierarchy": 6, "regress": 4}
FLAGS = {
    "entail": ["--text_column", "a,b"],
    "similar": ["--text_column", "a,b"],
    "choose": ["--choice_column", "c0,c1"],
    "hierarchy": ["--hierarchy", "/"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("kinds")
    start = ["--ds_config", ds_config(home), "--global_batch_size", 16, "--dropout", 0]
    learn = ["--init_from", pretrained("post", seq_len=96), "--from_scratch", "--lr", 4e-3]
    files = {
        k: ["--train", write(home / f"{k}.csv", k, N_TRAIN, 0), "--valid", write(home / f"{k}-dev.csv", k, N_VALID, 1)]
        for k in (*KINDS, "short")
    }

    def case(name: str, kind: str, *more) -> list:
        known = ["--kind", KIND_OF.get(kind, kind), *FLAGS.get(kind, [])]
        return [*start, "--run_dir", home / name, *files[kind], *known, *more]

    cases = [case(kind, kind, *learn, "--epochs", EPOCHS.get(kind, 2)) for kind in KINDS]
    cases.append([*start, "--run_dir", home / "ordered", "--task", "stsb", "--task_data", write_stsb(home), *learn])
    cases[-1] += ["--epochs", 3]
    cases.append(case("pooled_mlp", "classify", *learn, "--epochs", 2, "--head", "pooled_mlp"))
    cases.append(case("ulmfit", "classify", "--recipe", "ulmfit", "--init_from", loud(home), "--lr", 4e-3))
    frozen = ["--recipe", "feature", "--init_from", loud(home), "--lr", 0.1, "--epochs", 4, "--head_dropout", 0]
    cases.append(case("feature", "short", *frozen))
    run_ranks(train_all, 1, cases, timeout=280)
    return home


METRICS = {"multilabel": "micro_f1", "hierarchy": "micro_f1", "regress": "pearson", "ordered": "pearson"}


@pytest.mark.parametrize("name", [*KINDS, "ordered", "pooled_mlp", "ulmfit", "feature"])
def test_a_task_that_can_be_learnt_is_learnt(runs, name):
    summary = json.loads((runs / name / "summary.json").read_text())
    metric = METRICS.get(name, "accuracy")
    ((split, found),) = summary["metrics"].items()
    assert found[metric] >= 0.99
    assert summary["constant"][split][metric] < 0.8


def test_a_child_s_label_is_never_likelier_than_its_parent_s(runs):
    with open(runs / "hierarchy" / "predictions" / "valid.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    children = [name for name in rows[0] if "/" in name]
    assert children == ["bad/own", "good/people", "good/way"]
    for r in rows:
        assert all(float(r[name]) <= float(r[name.partition("/")[0]]) for name in children)


def test_predicted_numbers_are_in_the_units_of_the_file(runs):
    lines = (runs / "regress" / "predictions" / "valid.tsv").read_text().splitlines()
    assert lines[0] == "id\tlabel"
    with open(runs / "regress-dev.csv", newline="") as file:
        truth = [float(r["label"]) for r in csv.DictReader(file)]
    found = [float(line.split("\t")[1]) for line in lines[1:]]
    assert sum(abs(a - b) for a, b in zip(found, truth, strict=True)) / len(truth) < 1
