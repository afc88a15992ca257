"""What strangers may hand in, and how each is read: for random inputs there is a clear error or a right result.

A target is made in an empty folder and gives examples of good inputs, words that belong to the format, and a function
that reads any bytes. It raises nothing but a MegaGPTError, whose message is one line.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from megagpt.errors import MegaGPTError


@dataclass(frozen=True)
class Target:
    seeds: list[bytes]
    words: list[bytes]
    read: Callable[[bytes], None]  # any exception but a MegaGPTError is a defect
    is_json: bool = False

    def check(self, data: bytes) -> bool:
        """Read ``data``; whether it was accepted."""
        told = None
        try:
            self.read(data)
        except MegaGPTError as error:
            told = str(error)
        assert told is None or told.strip(), "an error without a word"
        assert told is None or "\n" not in told, f"more than a line: {told}"
        return told is None

    def inputs(self) -> st.SearchStrategy[bytes]:
        """Damaged good inputs and, more rarely, anything."""
        texts = st.one_of([mutated(seed, self.words) for seed in self.seeds])
        if not self.is_json:
            return texts | st.binary(max_size=200)
        return st.one_of([damaged(json.loads(seed)) for seed in self.seeds]) | texts


ODD = st.sampled_from(
    [
        *[None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf")],
        *["", "a", "\0", "../../etc/passwd", "\ud800", "9" * 5000],
        *[[], [[]], [None], ["a", 1], {}, {"a": None}, {"": ""}],
    ]
)
_FIRST = 30  # entries of a vocabulary stand for all
_DEEP = b"[" * 100_000


@st.composite
def changed(draw, original):
    """``original`` with up to three of its places given another value, removed or added to."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while True:
            keys = (sorted(place) if isinstance(place, dict) else list(range(len(place))))[:_FIRST]
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.integers(0, 3)):
                place = place[key]
                continue
            what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
            if what == "replace":
                place[key] = copy.deepcopy(draw(ODD))
            elif what == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=5))] = copy.deepcopy(draw(ODD))
            else:
                place.append(copy.deepcopy(draw(ODD)))
            break
    return value


@st.composite
def damaged(draw, original):
    """The bytes of a changed ``original``, in some cases with bytes of the text replaced or cut off."""
    text = bytearray(json.dumps(draw(changed(original))).encode())
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
        del text[draw(st.integers(0, len(text))) :]
    return bytes(text)


@st.composite
def mutated(draw, original, words):
    """The bytes ``original`` with up to four pieces replaced by bytes or ``words``, removed, doubled, or cut off."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.integers(0, 8))
        what = draw(st.integers(0, 9))
        if what < 4:
            data[at:end] = draw(st.binary(max_size=8))
        elif what < 7:
            data[at:end] = draw(st.sampled_from(words))
        elif what == 7:
            data[at:at] = data[at : at + draw(st.integers(0, 40))]
        elif what == 8:
            del data[at:end]
        else:
            del data[at:]
    return bytes(data)


# the targets --------------------------------------------------------------------------------------------------------

DOCUMENTS = [[k % 97] * (k % 5 + 1) for k in range(1, 20)]


def index(folder: Path) -> Target:
    """The .idx of a corpus without a sidecar, whose payload is not touched."""
    from test_data_indexed import without_sidecar, write

    from megagpt.data.indexed import IndexedDataset

    prefix = without_sidecar(write(folder, DOCUMENTS))
    path = Path(prefix + ".idx")
    tokens = [token for document in DOCUMENTS for token in document]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        dataset = IndexedDataset(prefix)
        assert len(dataset) <= len(data), "more documents than the file has bytes"
        found = [token for i in range(len(dataset)) for token in dataset.document(i).tolist()]
        assert found == tokens[: len(found)], "tokens that are not there, or not in their order"

    words = [number.to_bytes(8, "little", signed=True) for number in (-1, 0, 1, 2, 19, 2**31, 2**62, -(2**63))]
    return Target([path.read_bytes()], [*words, b"MMIDIDX\0\0"], read)


def sidecar(folder: Path) -> Target:
    """The .json of a corpus."""
    from test_data_indexed import write

    from megagpt.data.indexed import IndexedDataset

    prefix = write(folder, DOCUMENTS)
    path = Path(prefix + ".json")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        dataset = IndexedDataset(prefix)
        assert [dataset.document(i).tolist() for i in range(len(dataset))] == DOCUMENTS
        assert dataset.needed_vocabulary() > 0
        json.dumps(dataset.identity())

    return Target([path.read_bytes()], [b"null", b"-1", b"1e999", b'"', b"[", b"{", _DEEP], read, is_json=True)


def tokenizer(folder: Path) -> Target:
    """A tokenizer.json."""
    from data_common import write_tokenizer

    from megagpt.data.tokenizer import from_file

    path = write_tokenizer(folder / "tokenizer.json")
    whole = json.loads(path.read_text())
    model = whole["model"]
    kept = dict(sorted(model["vocab"].items(), key=lambda item: item[1])[:300])
    merges = [m for m in model.get("merges", []) if "".join(m if isinstance(m, list) else m.split()) in kept]
    small = {**whole, "model": {**model, "vocab": kept, "merges": merges}}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = from_file(path)
        ids = found.encode("Some text, 12 words or so.\n <|endoftext|> é")
        assert all(0 <= i < found.vocab_size for i in ids)
        assert isinstance(found.decode(ids), str)

    words = [b"null", b"-1", b"4294967296", b'"(a+)+$"', b'"\\\\p{L}+"', b"[", b"{", b'"type":"BPE"', _DEEP]
    return Target([json.dumps(small).encode()], words, read, is_json=True)


def ds_config(folder: Path) -> Target:
    """A DeepSpeed file, as far as a run looks at it before anything starts."""
    from megagpt.config import deepspeed
    from megagpt.config.fields import TrainSettings

    path = folder / "ds.json"
    settings = TrainSettings(ds_config=str(path), data=("x",), run_dir="runs/x")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = deepspeed.resolve(
            deepspeed.load(str(path)), settings, 2, path=str(path), hidden_size=64, default_global_batch=8
        )
        assert found.micro_batch * found.accumulation * 2 == found.global_batch
        assert '"auto"' not in json.dumps(found.config)
        deepspeed.check_hardware(found, "cuda", (9, 0))

    files = Path(__file__).parents[1] / "ds_configs"
    shipped = [(files / f"{name}.json").read_bytes() for name in ("cpu", "zero2_fp16", "zero3_bf16", "zero3_offload")]
    return Target(shipped, [b'"auto"', b"null", b"1e999", b"-1", b"#", b"/*", b"'''", b"[", b"{", _DEEP], read, True)


RECIPE = {
    "head": "pooled_mlp",
    "order": "grouped",
    "dropout_multiplier": 0.5,
    "phases": [{"name": "head", "groups": ["head"], "epochs": 1, "lr": 0.01}, {"name": "all", "epochs": 2}],
}


def recipe(folder: Path) -> Target:
    """The phases of fine-tuning in a file of the user's."""
    from megagpt.finetune.recipes import Choices, load_recipe

    path = folder / "recipe.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = load_recipe(str(path), Choices())
        assert found.phases
        for phase in found.phases:
            phase.rates()

    return Target([json.dumps(RECIPE).encode()], [b"null", b"-1", b"1e999", b'"head"', b"[", _DEEP], read, True)


def task(folder: Path) -> Target:
    """What a fine-tuned model's file says about its task and its decoder."""
    from megagpt.finetune.weights import described

    config = {"vocab_size": 300, "seq_len": 16, "n_layer": 2, "n_head": 2, "d_model": 8, "norm": "post"}
    spec = {"task": "my", "kind": "classify", "labels": ["minus", "plus"], "n_outputs": 2, "head": "linear"}
    spec |= {"head_dropout": 0.1, "text_columns": ["text"], "parents": [None, 0], "context": 16, "shift": 0.0}

    def read(data: bytes) -> None:
        half = data.find(b"\n")
        texts = [part.decode("utf-8", "replace") for part in (data[:half], data[half + 1 :])]
        found, model, sha256 = described(
            {"task": texts[0], "config": texts[1], "tokenizer_sha256": "0" * 64}, folder, n_bytes=100_000
        )
        assert model.n_params() <= 100_000
        assert found.n_outputs > 0
        assert sha256

    good = (json.dumps(spec) + "\n" + json.dumps(config)).encode()
    return Target([good], [b"null", b"-1", b"1e999", b'"', b"[]", b"{}", b"1000000000", _DEEP], read)


ARTICLE = {"article": "A b.", "questions": ["C _?"], "options": [["d", "e"]], "answers": ["A"], "id": "x"}


def race(folder: Path) -> Target:
    """A task's JSON as it is published: articles with questions."""
    from megagpt.finetune.formats import race as read_race

    home = folder / "race"
    home.mkdir()

    def read(data: bytes) -> None:
        (home / "1.txt").write_bytes(data)
        part = read_race(home)
        assert all(isinstance(text, str) for draft in part.drafts for text in draft.texts)

    return Target([json.dumps(ARTICLE).encode()], [b"null", b"1", b'"', b"[", b"\xff", _DEEP], read, is_json=True)


ABSTRACT = {"pmid": 1, "sentences": ["A b.", "C d."], "labels": ["x"], "sentence_labels": [["x", "y"], []]}


def hallmarks(folder: Path) -> Target:
    """A task's JSON lines as they are published: abstracts with lists of labels."""
    from megagpt.finetune.formats import hallmarks as read_hallmarks

    path = folder / "any.jsonl"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for key in ("labels", "sentence_labels"):
            assert all(isinstance(label, str) for draft in read_hallmarks(key)(path).drafts for label in draft.label)

    return Target([json.dumps(ABSTRACT).encode()], [b"null", b"1", b'"', b"[", b"\xff", _DEEP], read, is_json=True)


def hostlist(folder: Path) -> Target:
    """Slurm's lists of hosts and of tasks."""
    from megagpt.dist import hostlist as module
    from megagpt.dist.hostlist import expand_hostlist, expand_tasks

    def hosts(text: str) -> None:
        assert all(expand_hostlist(text))

    def tasks(text: str) -> None:
        assert all(count >= 0 for count in expand_tasks(text))

    def read(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        most, module._MOST = module._MOST, 5_000  # a million names, which are let through, take a second
        try:
            _each(lambda: hosts(text), lambda: tasks(text))
        finally:
            module._MOST = most

    seeds = [b"n[1-3,07],login", b"2(x3),1", b"rack[0-1]n[08-10]"]
    return Target(seeds, [b"[", b"]", b"-", b",", b"(x", b")", b"9" * 30, b"[0-9999]"], read)


def _each(*reads: Callable[[], None]) -> None:
    """All of ``reads``, and then the error of the last one where all have refused."""
    refused = []
    for read in reads:
        try:
            read()
        except MegaGPTError as error:
            refused.append(error)
    if len(refused) == len(reads):
        raise refused[-1]


def _table(folder: Path, ending: str, seeds: list[bytes], words: list[bytes]) -> Target:
    """A file of examples to fine-tune on and, the same file, of texts to prepare."""
    from megagpt.data import documents, readers
    from megagpt.data.sources import find
    from megagpt.finetune.own_data import Columns, load_files

    path = folder / f"any{ending}"

    def prepare() -> None:
        skipped = documents.Skipped()
        for block in readers.blocks(find([str(path)], "auto", by_line=False), readers.Reading()):
            assert all(isinstance(text, str) for text in documents.texts(block, "text", skipped))

    def fine_tune() -> None:
        data = load_files(str(path), {}, columns=Columns("classify"))
        assert all(text for e in data.train.examples for text in e.texts)
        data.identity()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        _each(prepare, fine_tune)

    return Target(seeds, [*words, b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\r", b"\xed\xa0\x80"], read)


def csv(folder: Path) -> Target:
    """CSV files."""
    seeds = [b'text,label\n"a, b",plus\nc,minus\n', b"label,text\n1,x\n0,y\n"]
    return _table(folder, ".csv", seeds, [b'"', b",", b"\n", b'""', b"text"])


def tsv(folder: Path) -> Target:
    """TSV files."""
    return _table(folder, ".tsv", [b"text\tlabel\na b\tplus\nc\tminus\n"], [b'"', b"\t", b"\n", b"text"])


def jsonl(folder: Path) -> Target:
    """Files of JSON lines."""
    seeds = [b'{"text": "a b", "label": 1}\n{"text": "c", "label": 0}\n', b'{"label": "x", "text": "\\ud83d\\ude00"}\n']
    return _table(folder, ".jsonl", seeds, [b"NaN", b"null", b"\n", b'"\\ud800"', b"1e999", b"9" * 5000, b"[", _DEEP])


TARGETS = {
    make.__name__: make
    for make in (index, sidecar, tokenizer, ds_config, recipe, task, race, hallmarks, hostlist, csv, tsv, jsonl)
}
