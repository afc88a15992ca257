"""JSON files from strangers: whatever a place in them holds, there is one clear error or a right result."""

import copy
import json
import shutil
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_indexed import DOCUMENTS, write

from megagpt.data.indexed import IndexedDataset
from megagpt.data.tokenizer import from_file
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.finetune.recipes import Choices, load_recipe
from megagpt.train import manifest

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
ODD = st.sampled_from(
    [
        *[None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf")],
        *["", "a", "\0", "../../etc/passwd", "\ud800", "9" * 5000],
        *[[], [[]], [None], ["a", 1], {}, {"a": None}, {"": ""}],
    ]
)
_FIRST = 30  # entries of a vocabulary stand for all


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


def test_a_sidecar(tmp_path):
    prefix = write(tmp_path, DOCUMENTS)
    good = json.loads((tmp_path / "corpus.json").read_text())

    @QUICK
    @given(damaged(good))
    def check(content):
        (tmp_path / "corpus.json").write_bytes(content)
        with suppress(DataError):
            dataset = IndexedDataset(prefix)
            assert [dataset.document(i).tolist() for i in range(len(dataset))] == DOCUMENTS
            assert dataset.needed_vocabulary() > 0
            json.dumps(dataset.identity())

    check()


def test_a_tokenizer(tokenizer, tmp_path):
    path = shutil.copy(tokenizer, tmp_path / "tokenizer.json")
    good = json.loads(path.read_text())
    shrunk = {**good, "model": {**good["model"], "merges": good["model"].get("merges", [])[:20]}}

    @QUICK
    @given(damaged(shrunk) | damaged(good))
    def check(content):
        path.write_bytes(content)
        with suppress(DataError):
            found = from_file(path)
            ids = found.encode("Some text, 12 words or so.\n <|endoftext|> é")
            assert all(0 <= i < found.vocab_size for i in ids)
            assert isinstance(found.decode(ids), str)

    check()


RECIPE = {
    "head": "pooled_mlp",
    "order": "grouped",
    "dropout_multiplier": 0.5,
    "phases": [{"name": "head", "groups": ["head"], "epochs": 1, "lr": 0.01}, {"name": "all", "epochs": 2}],
}


def test_a_recipe(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    assert len(load_recipe(str(path), Choices()).phases) == 2

    @QUICK
    @given(damaged(RECIPE))
    def check(content):
        path.write_bytes(content)
        with suppress(ConfigError):
            assert load_recipe(str(path), Choices()).phases

    check()


@pytest.fixture
def saved(tmp_path):
    """A committed checkpoint without tensors."""
    tmp = tmp_path / manifest.tmp_name(3)
    tmp.mkdir()
    state = {"step": 3, "samples": 12, "tokens": 96, "model": {"d_model": 8}, "data": {"seed": 1}}
    (tmp / manifest.STATE).write_text(json.dumps(state))
    header = {"step": 3, "world_size": 2, "zero_stage": 1, "precision": "fp32", "model": {"d_model": 8}, "data": {}}
    manifest.commit(tmp, tmp_path / "global_step3", [manifest.hash_file(tmp, manifest.STATE)], header)
    return tmp_path / "global_step3"


def test_a_manifest(saved):
    good = (saved / manifest.MANIFEST).read_bytes()

    @QUICK
    @given(damaged(json.loads(good)))
    def check(content):
        (saved / manifest.MANIFEST).write_bytes(content)
        assert manifest.problem(saved) is not None
        assert not manifest.seems_whole(saved)

    check()
    (saved / manifest.MANIFEST).write_bytes(good)
    assert manifest.problem(saved) is None


def test_what_a_checkpoint_says_of_itself(saved):
    @QUICK
    @given(damaged(json.loads((saved / manifest.STATE).read_text())))
    def check(content):
        (saved / manifest.STATE).write_bytes(content)
        with suppress(CheckpointError):
            assert manifest.read_source(saved.parent).model is not None

    check()
