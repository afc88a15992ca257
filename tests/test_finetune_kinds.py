"""Every kind of task is learnt from nothing on a small set that can be learnt.

The model reads 96 tokens, so that no text is cut: a quarter of them is what a choice may have.
"""

import csv
import json
import random
from pathlib import Path

import pytest
from distributed import run_ranks
from finetune_common import ds_config, pretrained, train_all

FILLER = ("time", "man", "thing", "day", "no", "other")


def words(rng: random.Random, *keys: str) -> str:
    found = [rng.choice(FILLER) for _ in range(rng.randint(0, 2))]
    for key in keys:
        found.insert(rng.randrange(len(found) + 1), key)
    return " ".join(found)


def row(kind: str, rng: random.Random) -> dict:
    yes = rng.random() < 0.5
    key = "good" if yes else "bad"
    if kind == "classify":
        return {"text": words(rng, key), "label": key}
    if kind == "entail":  # the first text says the same or the opposite by chance
        return {"a": words(rng, rng.choice(("good", "bad"))), "b": words(rng, key), "label": key}
    if kind == "similar":
        return {"a": words(rng, key), "b": words(rng, key), "label": key}
    if kind == "choose":
        right, n = rng.randrange(2), 2
        return {
            "text": words(rng, "way"),
            **{f"c{k}": words(rng, "good" if k == right else "bad") for k in range(n)},
            "label": right,
        }
    if kind == "multilabel":
        names = [name for name in ("good", "bad", "way") if rng.random() < 0.5]
        return {"text": words(rng, "people", *names), "label": "|".join(names)}
    n = rng.randint(0, 4)
    return {"text": words(rng, "people", *["good"] * n), "label": 10 + 5 * n}


COLUMNS = {"entail": "a,b", "similar": "a,b"}


def write(path: Path, kind: str, n: int, seed: int) -> Path:
    rng = random.Random(seed)
    rows = [row(kind, rng) for _ in range(n)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


KINDS = ("classify", "entail", "similar", "choose", "multilabel", "regress")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("kinds")
    start = ["--ds_config", ds_config(home, 1), "--init_from", pretrained("post", seq_len=96), "--from_scratch"]
    start += ["--global_batch_size", 16, "--dropout", 0]
    files = {k: (write(home / f"{k}.csv", k, 384, 0), write(home / f"{k}-dev.csv", k, 150, 1)) for k in KINDS}

    def case(name: str, kind: str, *more) -> list:
        train, valid = files[kind]
        columns = ["--kind", kind, "--text_column", COLUMNS.get(kind, "text")]
        columns += ["--choice_column", "c0,c1"] if kind == "choose" else []
        return [*start, "--run_dir", home / name, "--train", train, "--valid", valid, *columns, *more]

    learn = ["--lr", 3e-3, "--epochs", 20]
    cases = [case(kind, kind, *learn) for kind in KINDS]
    cases.append(case("pooled_mlp", "classify", *learn, "--head", "pooled_mlp"))
    cases.append(case("feature", "classify", "--recipe", "feature", "--lr", 0.05, "--epochs", 6))
    run_ranks(train_all, 1, cases, timeout=280)
    return home


@pytest.mark.parametrize("kind", [*KINDS, "pooled_mlp"])
def test_a_task_that_can_be_learnt_is_learnt(runs, kind):
    summary = json.loads((runs / kind / "summary.json").read_text())
    metric = {"multilabel": "micro_f1", "regress": "pearson"}.get(kind, "accuracy")
    (found,) = summary["metrics"].values()
    assert found[metric] >= 0.99
    assert summary["constant"]["valid"][metric] < 0.8


def test_a_mix_of_frozen_layers_learns_more_than_a_constant(runs):
    summary = json.loads((runs / "feature" / "summary.json").read_text())
    assert summary["metrics"]["valid"]["accuracy"] > summary["constant"]["valid"]["accuracy"] + 0.1


def test_predicted_numbers_are_in_the_units_of_the_file(runs):
    lines = (runs / "regress" / "predictions" / "valid.tsv").read_text().splitlines()
    assert lines[0] == "id\tlabel"
    with open(runs / "regress-dev.csv", newline="") as file:
        truth = [float(r["label"]) for r in csv.DictReader(file)]
    found = [float(line.split("\t")[1]) for line in lines[1:]]
    assert sum(abs(a - b) for a, b in zip(found, truth, strict=True)) / len(truth) < 1
