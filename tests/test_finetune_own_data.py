"""A user's own files become a task, and what is wrong with them is told in one sentence."""

import gzip
import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import ConfigError, DataError
from megagpt.finetune.examples import Example, Split, TaskData
from megagpt.finetune.inputs import task_name
from megagpt.finetune.own_data import Columns, load_files, load_inputs

TWO = "text,label\ngood film,pos\nbad film,neg\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working directory; its name."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(data)
        return name

    return write


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def labels(split):
    return [e.label for e in split.examples]


def test_a_csv_becomes_a_task_with_the_labels_of_its_training_file(write):
    data = load_files(write("a.csv", TWO), {"dev": write("v.csv", 'text,label\n"so, ""so""\nfilm",pos\n')})
    assert data.labels == ("neg", "pos")
    assert labels(data.train) == [1, 0]
    assert data.valid["dev"].examples == (Example("0", ('so, "so"\nfilm',), (), 1),)
    assert (data.kind, data.metrics, data.n_outputs) == ("classify", ("accuracy", "f1", "matthews"), 2)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_files_may_be_compressed_and_begin_with_a_byte_order_mark(write, compress):
    name = write("a.tsv", compress(b'\xef\xbb\xbftext\tlabel\r\nx\t1\r\n"y\t0\r\n'))
    assert [e.texts for e in load_files(name, {}).train.examples] == [("x",), ('"y',)]


def test_quotes_in_a_tsv_are_characters_unless_asked(write):
    name = write("a.tsv", 'text\tlabel\n"x\ny"\t1\nz\t0\n')
    quoted = load_files(name, {}, columns=Columns("classify", quoting="standard"))
    assert [e.texts for e in quoted.train.examples] == [("x\ny",), ("z",)]
    with pytest.raises(DataError, match=r"row has no label|training labels|bad"):
        load_files(write("b.tsv", 'text\tlabel\n"x\ny"\n'), {})


def test_columns_of_a_file_without_header_go_by_number(write):
    data = load_files(write("a.tsv", "x\tgood\ny\tbad\n"), {}, columns=Columns("classify", ("1",), ("2",)))
    assert [(e.texts, data.labels[e.label]) for e in data.train.examples] == [(("x",), "good"), (("y",), "bad")]


@pytest.mark.parametrize("path", ["tickets.csv", "tickets.v2.tsv.gz", "tickets/train.csv", "a/tickets/Train.jsonl.xz"])
def test_a_task_is_called_as_its_file_or_as_the_folder_of_a_train_file(path, monkeypatch, tmp_path):
    assert task_name(path) == "tickets"
    (tmp_path / "tickets").mkdir()
    monkeypatch.chdir(tmp_path / "tickets")
    assert task_name("train.csv") == "tickets"
    assert task_name("/train.csv") == "train"


def test_whole_numbers_as_labels_stand_in_their_order(write):
    rows = "".join(f"t,{label}\n" for label in (10, 9, 2))
    assert load_files(write("a.csv", "text,label\n" + rows), {}).labels == ("2", "9", "10")


def test_json_lines_may_hold_numbers_and_truth_values_as_labels(write):
    name = write("a.jsonl", lines({"text": "x", "label": True}, {"text": "y", "label": False}))
    assert load_files(name, {}).labels == ("false", "true")


def test_pairs_come_from_two_columns(write):
    columns = Columns("similar", ("a", "b"))
    data = load_files(write("a.csv", "a,b,label\nx,y,1\nz,w,0\n"), {}, columns=columns)
    assert data.train.examples[0].texts == ("x", "y")


def test_choices_come_from_a_column_each_or_from_a_list(write):
    table = load_files(
        write("a.csv", "q,c1,c2,label\nx,l,r,1\ny,l,r,A\n"), {}, columns=Columns("choose", ("q",), choices=("c1", "c2"))
    )
    assert labels(table.train) == [1, 0]
    rows = lines({"q": "x", "c": ["l", "m", "r"], "label": 2}, {"q": "x", "c": ["l", "r"], "label": "B"})
    listed = load_files(write("a.jsonl", rows), {}, columns=Columns("choose", ("q",), choices=("c",)))
    assert [(e.choices, e.label) for e in listed.train.examples] == [(("l", "m", "r"), 2), (("l", "r"), 1)]
    assert listed.n_outputs == 1


def test_several_labels_stand_in_a_cell_or_in_columns_of_marks(write):
    cells = load_files(write("a.csv", "text,label\nx,b|a\ny,\nz,b\n"), {}, columns=Columns("multilabel"))
    marks = load_files(
        write("b.csv", "text,a,b\nx,1,1\ny,0,0\nz,0,1\n"), {}, columns=Columns("multilabel", label=("a", "b"))
    )
    assert cells.labels == marks.labels == ("a", "b")
    assert labels(cells.train) == labels(marks.train) == [(0, 1), (), (1,)]


def test_a_label_in_a_hierarchy_brings_those_above_it(write):
    name = write("a.csv", "text,label\nx,animal/bird|plant\ny,animal/fish\n")
    data = load_files(name, {}, columns=Columns("multilabel"), hierarchy="/")
    assert data.labels == ("animal", "animal/bird", "animal/fish", "plant")
    assert data.parents == (None, 0, 0, None)
    assert labels(data.train) == [(0, 1, 3), (0, 2)]


def test_numbers_are_targets_of_regress(write):
    data = load_files(write("a.csv", "text,label\nx,1.5\ny,-2\n"), {}, columns=Columns("regress"))
    assert labels(data.train) == [1.5, -2.0]
    assert data.metrics == ("pearson", "spearman", "rmse")


def test_test_files_may_lack_labels(write):
    columns = Columns("classify", id="name")
    train = write("a.csv", "name,text,label\np,x,1\nq,y,0\n")
    data = load_files(train, {}, {"test": write("t.csv", "name,text\nr,z\n")}, columns)
    assert data.test["test"].examples == (Example("r", ("z",), (), None),)


def test_inputs_to_be_answered_need_no_labels_and_all_their_rows(write):
    assert load_inputs(write("a.csv", "text\nx\ny\n"), Columns("classify")).examples[1].texts == ("y",)
    with pytest.raises(DataError, match=r"1 rows cannot be answered; the first: b\.csv:3: 2 columns, not 1"):
        load_inputs(write("b.csv", "text\nx\ny,z\n"), Columns("classify"))


def test_rows_of_another_width_are_counted_with_their_lines(write):
    data = load_files(write("a.csv", "text,label\nx,1\nshort\ny,0\nz,0,long\n"), {})
    assert data.train.n_skipped == 2
    assert data.train.skipped == ("a.csv:3: 1 columns, not 2", "a.csv:5: 3 columns, not 2")
    assert len(data.train) == 2


BAD_FILES = {
    "a misnamed column": ("a.csv", "txt,label\nx,1\n", "a.csv has no column 'text' (did you mean 'txt'?)"),
    "all rows bad": ("a.csv", "text,label\nx\ny,1,2\n", "no row for train can be used: 2 are bad; the first: a.csv:2"),
    "an empty text": ("a.csv", "text,label\n ,1\ny,0\n,1\n", "2 rows have an empty text: a.csv:2, a.csv:4"),
    "a missing label": ("a.csv", "text,label\nx,\ny,0\n", "1 row has no label: a.csv:2"),
    "one class": ("a.csv", "text,label\nx,1\ny,1\n", "train: all 2 examples have the same label"),
    "an open quote": ("a.csv", 'text,label\n"x,1\ny,0\n', "a.csv:2: a quote that opens in this row is not closed"),
    "nothing": ("a.csv", "", "a.csv has no rows"),
    "a header alone": ("a.csv", "text,label\n", "a.csv has no rows"),
    "UTF-16": ("a.csv", TWO.encode("utf-16"), "a.csv is UTF-16; save it as UTF-8"),
    "Latin-1": ("a.csv", "text,label\né,1\nè,0\n".encode("latin-1"), "the first: a.csv:2: text is not UTF-8"),
    "another format": ("a.docx", TWO, "a.docx is neither .csv, .tsv nor .jsonl by its name"),
    "no JSON": ("a.jsonl", "x\n[1]\n", "the first: a.jsonl:1: not a JSON object"),
    "two columns of a name": ("a.csv", "text,text,label\nx,y,1\n", "a.csv has 2 columns 'text'"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(write, name, content, message):
    with pytest.raises(DataError) as error:
        load_files(write(name, content), {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["nan", "NaN", "inf", "1,2", "high"])
def test_a_target_that_is_no_finite_number_is_refused(write, target):
    rows = lines({"text": "x", "label": 1.0}, {"text": "y", "label": target})
    with pytest.raises(DataError, match=r"a\.jsonl:2: target .* number"):
        load_files(write("a.jsonl", rows), {}, columns=Columns("regress"))


def test_a_label_that_train_lacks_is_refused_with_the_nearest(write):
    dev = write("v.csv", "text,label\nx,pos\ny,negg\n")
    message = r"v\.csv:3: label 'negg' \(did you mean 'neg'\?\) is none of the training labels neg, pos"
    with pytest.raises(DataError, match=message):
        load_files(write("a.csv", TWO), {"dev": dev})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"c": ["l", "r"], "label": 2}, "names none of the 2 choices"),
        ({"c": ["l", "r"], "label": "-1"}, "names none of the 2 choices"),
        ({"c": ["l"], "label": 0}, "1 choice where every example must have 2"),
        ({"c": ["l", "m", "r"], "label": 0}, "3 choices where every example must have 2"),
        ({"c": "l", "label": 0}, "c is no list"),
    ],
)
def test_choices_that_do_not_fit_are_refused(write, row, message):
    rows = lines({"q": "x", "c": ["l", "r"], "label": 0}, {"q": "y", **row})
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*" + message):
        load_files(write("a.jsonl", rows), {}, columns=Columns("choose", ("q",), choices=("c",)), n_choices=2)


BAD_COLUMNS = {
    "an unknown kind": ({"kind": "clasify"}, "kind 'clasify' is unknown (did you mean 'classify'?)"),
    "one text for a pair": ({"kind": "entail"}, "--text_column text names 1 columns; kind entail has 2"),
    "no choices": ({"kind": "choose"}, "kind choose needs --choice_column"),
    "choices of a class": ({"kind": "classify", "choices": ("a", "b")}, "kind classify has no choices"),
    "a column twice": ({"kind": "entail", "text": ("a", "a")}, "column 'a' is named twice"),
    "two label columns": ({"kind": "classify", "label": ("a", "b")}, "kind classify has one column of labels"),
    "unknown quoting": ({"kind": "classify", "quoting": "both"}, "--quoting 'both' is unknown"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_COLUMNS.values(), ids=BAD_COLUMNS)
def test_columns_that_do_not_suit_the_kind_are_refused(settings, message):
    with pytest.raises(ConfigError) as error:
        Columns(**settings)
    assert message in str(error.value)


def test_a_metric_must_suit_the_task(write):
    for metric, message in (("acuracy", "did you mean 'accuracy'"), ("pearson", "not for kind classify")):
        with pytest.raises(ConfigError, match=message):
            load_files(write("a.csv", TWO), {}, metrics=(metric,))
    with pytest.raises(ConfigError, match="metric f1 is for two classes and there are 3"):
        load_files(write("b.csv", TWO + "x,third\n"), {}, metrics=("f1",))


def _task(labels):
    examples = tuple(Example(str(i), ("t",), label=label) for i, label in enumerate(labels))
    return TaskData("x", "classify", ("a", "b"), ("accuracy",), Split("train", examples))


def test_a_smaller_training_set_keeps_every_class_and_its_share():
    data = _task([int(i % 10 == 0) for i in range(1000)])
    for limit, n, rare in ((2, 2, 1), (100, 100, 10), (0.5, 500, 50), (5000, 1000, 100)):
        labels = [e.label for e in data.limited(limit).train.examples]
        assert (len(labels), sum(labels)) == (n, rare)
    small, large = data.limited(50, seed=3).train.examples, data.limited(200, seed=3).train.examples
    assert set(small) <= set(large)
    assert small != data.limited(50, seed=4).train.examples
    kept = data.limited(50, seed=3, rest_as_text=True)
    assert kept.train.examples == small
    assert {e.id for e in kept.unlabelled.examples} == {e.id for e in data.train.examples} - {e.id for e in small}
    assert all(e.label is None for e in kept.unlabelled.examples)
    assert kept.identity() != data.limited(50, seed=3).identity()
    for limit in (0, -1, 1.5):
        with pytest.raises(ConfigError, match="limit_train"):
            data.limited(limit)


def test_the_identity_of_a_task_changes_with_any_example():
    assert _task([0, 1]).identity() == _task([0, 1]).identity()
    assert _task([0, 1]).identity() != _task([1, 0]).identity()


PIECES = ["text", "label", "a", "1", "", " ", ",", "\t", '"', "\n", "\r\n", "{", "}", "[", "null", "NaN"]
PIECES += ["\0", "\ufeff", "é", "\u2028", "\ud800", '{"text": "x", "label": 1}', '{"text": NaN, "label": "y"}']


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=30),
    ending=st.sampled_from([".csv", ".tsv", ".jsonl"]),
    kind=st.sampled_from(["classify", "multilabel", "regress"]),
    header=st.booleans(),
)
def test_any_bytes_are_a_task_or_a_data_error(tmp_path_factory, pieces, ending, kind, header):
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    begin = {".csv": "text,label\n", ".tsv": "text\tlabel\n"}.get(ending, "") if header else ""
    path.write_bytes((begin + "".join(pieces)).encode("utf-8", "surrogatepass"))
    try:
        data, message = load_files(str(path), {}, columns=Columns(kind)), ""
    except DataError as error:
        data, message = None, str(error)
    if data is None:
        assert message
        assert "\n" not in message
        return
    assert all(text for e in data.train.examples for text in e.texts)
    data.identity()
