"""Tasks by name: every published format on small files, and the real sets where MEGAGPT_DATA names their folder."""

import json
import os
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.errors import ConfigError, DataError
from megagpt.finetune.examples import KINDS
from megagpt.finetune.score import check_metrics, constant_baselines
from megagpt.finetune.tasks import TASKS, find_folder, load_task

DATA = os.environ.get("MEGAGPT_DATA")
REAL = [name for name in TASKS if DATA and find_folder(TASKS[name], DATA)]
needs_data = pytest.mark.skipif(not REAL, reason="MEGAGPT_DATA names no folder with task data")


def write(path: Path, *rows, header=None) -> None:
    """A file of tab-separated rows, or of JSON lines where rows are dicts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [header, *rows] if header else rows
    lines = [json.dumps(row) if isinstance(row, dict) else "\t".join(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def cells(n: int, **at: str) -> list[str]:
    """A row of ``n`` cells with the given ones at their places: _3="text"."""
    row = [f"x{i}" for i in range(n)]
    for place, value in at.items():
        row[int(place[1:])] = value
    return row


# Of each part of GLUE: its folder, columns of train, dev and test with those that count at their places, two labels.
PAIR = {"_1": "a b", "_2": "c d"}
GLUE_FILES = {
    "cola": ("CoLA", 4, {"_3": "a b"}, 1, ("0", "1"), 2, {"_1": "a b"}),
    "sst2": ("SST-2", 2, {"_0": "a b"}, 1, ("0", "1"), 2, {"_1": "a b"}),
    "mrpc": ("MRPC", 5, {"_3": "a b", "_4": "c d"}, 0, ("1", "0"), 5, {"_3": "a b", "_4": "c d"}),
    "stsb": ("STS-B", 10, {"_7": "a b", "_8": "c d"}, 9, ("2.5", "0.000"), 9, {"_7": "a b", "_8": "c d"}),
    "qqp": ("QQP", 6, {"_3": "a b", "_4": "c d"}, 5, ("0", "1"), 3, PAIR),
    "qnli": ("QNLI", 4, PAIR, 3, ("entailment", "not_entailment"), 3, PAIR),
    "rte": ("RTE", 4, PAIR, 3, ("not_entailment", "entailment"), 3, PAIR),
    "wnli": ("WNLI", 4, PAIR, 3, ("0", "1"), 3, PAIR),
}


def glue_header(name: str, n: int, texts: dict, label: int | None) -> list[str]:
    """The names that the columns have in the published files."""
    task = TASKS[name]
    header = cells(n, **dict(zip(texts, task.text, strict=True)))
    if label is not None:
        header[label] = task.label
    elif header[0] == "x0":
        header[0] = task.id
    return header


def write_glue(root: Path, name: str) -> None:
    folder, n, texts, label, labels, n_test, test_texts = GLUE_FILES[name]
    header = glue_header(name, n, texts, label) if name != "cola" else None
    rows = [cells(n, **texts, **{f"_{label}": value}) for value in labels]
    write(root / folder / "train.tsv", *rows, header=header)
    write(root / folder / "dev.tsv", rows[0], header=header)
    tests = [cells(n_test, _0=str(i), **test_texts) for i in range(2)]
    write(root / folder / "test.tsv", *tests, header=glue_header(name, n_test, test_texts, None))


@pytest.mark.parametrize("name", GLUE_FILES)
def test_the_layout_of_glue_is_read(tmp_path, name):
    write_glue(tmp_path, name)
    data = load_task(name, tmp_path)
    texts = ("a b",) if data.kind == "classify" else ("a b", "c d")
    assert all(e.texts == texts for split in data.splits() for e in split.examples)
    labels = [e.label for e in data.train.examples]
    assert labels == ([2.5, 0.0] if name == "stsb" else [data.labels.index(label) for label in GLUE_FILES[name][4]])
    assert [e.label for e in data.valid["dev"].examples] == labels[:1]
    assert [(e.id, e.label) for e in data.test["test"].examples] == [("0", None), ("1", None)]


def test_mnli_has_two_validation_sets_and_the_diagnostic_one(tmp_path):
    def header(n, label=None):
        row = cells(n, _0="index", _8="sentence1", _9="sentence2")
        return row if label is None else [*row[:label], "gold_label", *row[label + 1 :]]

    rows = [cells(12, _8="a b", _9="c d", _11=label) for label in ("neutral", "entailment", "contradiction", "-")]
    write(tmp_path / "MNLI/train.tsv", *rows, ["broken"], header=header(12, 11))
    for part in ("matched", "mismatched"):
        write(tmp_path / f"MNLI/dev_{part}.tsv", cells(16, _8="a", _9="c", _15="neutral"), header=header(16, 15))
        write(tmp_path / f"MNLI/test_{part}.tsv", cells(10, _0="7", _8="a", _9="c"), header=header(10))
    write(tmp_path / "diagnostic/diagnostic.tsv", ["0", "a", "c"], header=["index", "sentence1", "sentence2"])
    data = load_task("mnli", tmp_path)
    assert data.labels == ("entailment", "neutral", "contradiction")
    assert [e.label for e in data.train.examples] == [1, 0, 2]
    assert sorted(place.rpartition("/")[2] for place in data.train.skipped) == [
        "train.tsv:5: label '-' stands for none",
        "train.tsv:6: 1 columns, not 12",
    ]
    assert list(data.valid) == ["matched", "mismatched"]
    assert {name: split.examples[0].id for name, split in data.test.items()} == {
        "test_matched": "7",
        "test_mismatched": "7",
        "diagnostic": "0",
    }


def test_snli_and_scitail_are_read_as_published(tmp_path):
    rows = [
        {"gold_label": label, "sentence1": "a", "sentence2": "b", "pairID": "p"}
        for label in ("neutral", "-", "entailment")
    ]
    for part in ("train", "dev"):
        write(tmp_path / f"SNLI/snli_1.0_{part}.jsonl", *rows)
        write(
            tmp_path / f"SciTailV1.1/tsv_format/scitail_1.0_{part}.tsv", ['"a', "b", "neutral"], ["c", "d", "entails"]
        )
    snli, scitail = load_task("snli", tmp_path), load_task("scitail", tmp_path)
    assert [(e.id, e.label) for e in snli.train.examples] == [("p", 1), ("p", 0)]
    assert snli.valid["dev"].n_skipped == 1
    assert [(e.texts, e.label) for e in scitail.train.examples] == [(('"a', "b"), 1), (("c", "d"), 0)]


def test_race_is_read_from_its_folders_and_from_json_lines(tmp_path):
    passage = {
        "article": "text",
        "questions": ["q _ ", "r"],
        "options": [list("abcd")] * 2,
        "answers": ["B", "D"],
        "id": "high1.txt",
    }
    for part in ("train", "dev"):
        for level in ("high", "middle"):
            write(tmp_path / f"folders/RACE/{part}/{level}/1.txt", passage)
            write(tmp_path / f"lines/race/{part}.{level}.jsonl", passage)
    folders, lines = load_task("race", tmp_path / "folders"), load_task("race", tmp_path / "lines")
    assert folders == lines
    assert [(e.id, e.texts, e.choices, e.label) for e in lines.valid["high"].examples] == [
        ("high1.txt-0", ("text", "q _"), tuple("abcd"), 1),
        ("high1.txt-1", ("text", "r"), tuple("abcd"), 3),
    ]
    assert len(lines.train) == 4
    write(tmp_path / "lines/race/dev.high.jsonl", {**passage, "options": [list("abcd"), list("abc")]})
    with pytest.raises(DataError, match=r"dev\.high\.jsonl:1: 3 choices where every example must have 4"):
        load_task("race_high", tmp_path / "lines")


def test_story_cloze_keeps_stories_of_its_training_file_for_validation(tmp_path):
    names = ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5))]
    names += ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
    lines = [",".join(names), *(f"s{i},A.,B.,C.,D.,wrong,right,2" for i in range(10)), "s,A.,B.,C.,D.,l,r,3"]
    path = tmp_path / "cloze_test_val__spring2016 - cloze_test_ALL_val.csv"
    path.write_text("\n".join(lines) + "\n")
    data = load_task("story_cloze", tmp_path)
    assert (len(data.train), len(data.valid["dev"]), data.train.n_skipped) == (5, 5, 1)
    example = data.train.examples[0]
    assert (example.texts, example.choices, example.label) == (("A. B. C. D.",), ("wrong", "right"), 1)
    assert not {e.id for e in data.train.examples} & {e.id for e in data.valid["dev"].examples}
    assert data == load_task("story_cloze", tmp_path)


def test_reviews_are_read_from_the_published_folders(tmp_path):
    for part in ("train", "test"):
        for label in ("pos", "neg"):
            for i in range(20):
                path = tmp_path / f"aclImdb/{part}/{label}/{i}_9.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{label}<br />{i}")
    data = load_task("imdb", tmp_path)
    assert {e.texts[0].partition("\n")[0]: data.labels[e.label] for e in data.test["test"].examples} == {
        "pos": "positive",
        "neg": "negative",
    }
    assert (len(data.train), len(data.valid["dev"])) == (20, 20)


def test_trec_is_read_as_published(tmp_path):
    lines = ["DESC:manner How did it end ?", "HUM:ind Who was Beno\xeet ?"] * 20
    (tmp_path / "train_5500.label").write_text("\n".join(lines), encoding="latin-1")
    coarse, fine = load_task("trec", tmp_path), load_task("trec_fine", tmp_path)
    assert {(e.texts[0], coarse.labels[e.label]) for split in coarse.splits() for e in split.examples} == {
        ("How did it end ?", "DESC"),
        ("Who was Benoît ?", "HUM"),
    }
    assert fine.labels == ("DESC:manner", "HUM:ind")


def test_a_candidate_takes_the_place_of_the_pronoun_that_follows_all_of_them(tmp_path):
    rows = [
        {"text": "The bee sat on it, the flower, because it liked it.", "pronoun": "it",
         "candidates": ["The bee", "the flower"], "label": 0},
        {"text": "Ann met Eve. She smiled.", "pronoun": "She", "candidates": ["Ann", "Eve"], "label": 1},
    ]  # fmt: skip
    write(tmp_path / "dpr_train.jsonl", *rows)
    masked = {
        "text": "Joe saw Al, a man, and Bob; [MASK] ran.",
        "pronoun": "[MASK]",
        "candidates": ["Joe", "Al", "Bob"],
        "label": 2,
    }
    write(tmp_path / "dpr_dev.jsonl", rows[0])
    write(tmp_path / "pdp60.jsonl", masked, {**masked, "text": "no mask"})
    data = load_task("dpr", tmp_path)
    assert [(e.texts, e.choices, e.label) for e in data.train.examples] == [
        (("The bee sat on it, the flower, because",), ("the bee liked it.", "the flower liked it."), 0),
        (("Ann met Eve.",), ("Ann smiled.", "Eve smiled."), 1),
    ]
    assert data.valid["pdp60"].examples[0].choices == ("Joe ran.", "Al ran.", "Bob ran.")
    assert data.valid["pdp60"].n_skipped == 1


def test_definite_pronouns_are_read_from_their_records(tmp_path):
    record = "The bee landed on the flower because it had pollen.\nit\nThe bee,the flower\nthe flower\n"
    (tmp_path / "train.c.txt").write_text(f"{record}\n{record}\nbroken\n")
    data = load_task("dpr", tmp_path)
    assert (data.train.examples[0].choices[1], data.train.examples[0].label) == ("the flower had pollen.", 1)
    assert (len(data.train), len(data.valid["dev"]), data.train.n_skipped) == (1, 1, 1)


def test_a_hierarchy_of_labels_is_read_from_the_sentences_of_an_abstract(tmp_path):
    row = {"pmid": "1", "sentences": ["One .", "Two ."], "labels": ["A"], "sentence_labels": [[], ["A--B--C"]]}
    for part in ("train", "dev"):
        write(tmp_path / f"{part}.jsonl", row, {**row, "pmid": "2", "labels": [], "sentence_labels": [[], []]})
    flat, tree = load_task("hallmarks", tmp_path), load_task("hallmarks_tree", tmp_path)
    assert (flat.labels, flat.parents) == (("A",), ())
    assert (tree.labels, tree.parents) == (("A", "A--B", "A--B--C"), (None, 0, 1))
    assert [e.label for e in tree.train.examples] == [(0, 1, 2), ()]
    assert tree.train.examples[0].texts == ("One . Two .",)


def test_unknown_tasks_and_missing_files_are_told_with_the_way_out(tmp_path):
    with pytest.raises(ConfigError, match=r"task 'sst' is unknown \(did you mean 'sst2'\?\); megagpt tasks lists them"):
        load_task("sst", tmp_path)
    with pytest.raises(
        DataError, match=r"has no train\.tsv of task sst2, .* SST-2; give the folder of the task's files"
    ):
        load_task("sst2", tmp_path)
    write(tmp_path / "SST-2/train.tsv", ["a", "1"], ["b", "0"], header=["sentence", "label"])
    with pytest.raises(DataError, match=r"has no dev\.tsv, to validate sst2 on"):
        load_task("sst2", tmp_path)
    write(tmp_path / "SST-2/dev.tsv", ["a", "2"], header=["sentence", "label"])
    with pytest.raises(DataError, match=r"dev\.tsv:2: label '2' is none of the training labels 0, 1"):
        load_task("sst2", tmp_path)


def test_a_score_outside_its_range_is_refused(tmp_path):
    header = glue_header("stsb", 10, {"_7": "", "_8": ""}, 9)
    write(tmp_path / "train.tsv", cells(10, _9="5.1"), header=header)
    write(tmp_path / "dev.tsv", cells(10, _9="5.0"), header=header)
    with pytest.raises(DataError, match=r"train\.tsv:2: target 5\.1 is not a finite number between 0 and 5"):
        load_task("stsb", tmp_path)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_is_of_a_kind_and_its_metrics_suit_it(task):
    assert task.kind in KINDS
    check_metrics(task.metrics, task.kind, len(task.labels), ordinal=task.ordinal)
    assert not task.values or len(task.values) == len(task.labels)
    assert task.valid or task.held_out


def test_the_list_of_tasks_tells_sizes_where_files_are(tmp_path, capsys):
    write_glue(tmp_path, "rte")
    assert main(["tasks", "--task_data", str(tmp_path)]) == 0
    lines = {line.split()[0]: line.split()[1:6] for line in capsys.readouterr().out.splitlines()}
    assert lines["rte"] == ["entail", "accuracy", "2", "1", "56.0"]
    assert lines["qnli"] == ["entail", "accuracy", "-", "-", "88.1"]
    assert set(TASKS) <= set(lines)
    (tmp_path / "RTE/dev.tsv").unlink()
    assert main(["tasks", "--task", "rte", "--task_data", str(tmp_path / "RTE")]) == 2
    assert "to validate rte on" in capsys.readouterr().err
    assert main(["tasks", "--task_data", str(tmp_path)]) == 0
    assert "rte cannot be read: " in capsys.readouterr().out
    assert main(["tasks", "--task", "ret"]) == 2
    assert "did you mean 'rte'" in capsys.readouterr().err


# Sizes of the real files as their publisher counts them: train, then each validation set.
SIZES = {
    "cola": (8551, 527), "sst2": (67349, 872), "sst2_sentences": (6917, 872), "mrpc": (3667, 408),
    "rte": (2490, 277), "stsb": (5749, 1500), "qnli": (3527, 574), "qqp": (7654, 851), "snli": (8850, 986),
    "mnli_sample": (800, 200), "sick": (4500, 500), "sick_relatedness": (4500, 500),
    "race": (62429 + 25414, 3451, 1436), "race_middle": (25414, 1436), "race_high": (62429, 3451),
    "copa": (400, 100), "copa_balanced": (800, 100), "dpr": (1185, 131, 60), "airline": (11200, 1244),
    "imdb": (22365, 2512), "trec": (4952, 489), "trec_fine": (4952, 489), "ag_news": (5813, 647),
    "hallmarks": (1297, 185), "hallmarks_tree": (1297, 185),
    "afrisenti_am": (5984, 1497), "afrisenti_dz": (1651, 414), "afrisenti_ha": (14172, 2677),
    "afrisenti_ig": (10192, 1841), "afrisenti_kr": (3302, 827), "afrisenti_ma": (5583, 494),
    "afrisenti_pcm": (5121, 1281), "afrisenti_pt": (3063, 767), "afrisenti_sw": (1810, 453),
    "afrisenti_ts": (804, 203), "afrisenti_twi": (3481, 388), "afrisenti_yo": (8522, 2090),
    "masakhanews_lin": (608, 87), "masakhanews_lug": (771, 110), "masakhanews_pcm": (1060, 152),
    "masakhanews_sna": (1288, 185), "masakhanews_xho": (1032, 147),
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_without_the_loss_of_a_row(name):
    data = load_task(name, DATA)
    assert (len(data.train), *map(len, data.valid.values())) == SIZES[name]
    assert all(split.n_skipped == 0 for split in data.splits())
    assert all(text for split in data.splits() for e in split.examples for text in (*e.texts, *e.choices))
    assert len(data.unlabelled or ()) == (8000 if name == "imdb" else 0)


@needs_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sst2", {"accuracy": 50.92}),
        ("mrpc", {"f1": 81.22, "accuracy": 68.38}),
        ("rte", {"accuracy": 52.71}),
        ("cola", {"matthews": 0.0, "accuracy": 69.64}),  # of the in-domain half, 367 of 527 are acceptable
        ("stsb", {"pearson": 0.0, "spearman": 0.0}),
        ("airline", {"accuracy": 62.78}),  # 781 of 1,244 are negative
        ("copa", {"accuracy": 50.0}),
    ],
)
def test_constant_answers_on_real_files(name, expected):
    if name not in REAL:
        pytest.skip(f"MEGAGPT_DATA has no files of {name}")
    pytest.importorskip("sklearn")
    found = constant_baselines(load_task(name, DATA))["dev"]
    assert {metric: round(100 * found[metric], 2) for metric in expected} == expected
