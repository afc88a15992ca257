"""What docs/security.md says that the source does not do, and what strangers' weights cannot ask for."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megagpt.errors import CheckpointError

ROOT = Path(__file__).parent.parent
SOURCES = [*ROOT.glob("megagpt/**/*.py"), *ROOT.glob("kernels/megagpt_kernels/*.py"), *ROOT.glob("*.py")]
FORBIDDEN_CALLS = {"eval", "exec", "system", "popen", "extractall", "unpack_archive", "urlopen", "urlretrieve"}
FORBIDDEN_MODULES = {"requests", "urllib.request", "http.client", "socketserver", "tarfile", "marshal"}


def calls():
    """(where, name of the function, the call) of every call in the source."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                function = node.func
                name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
                owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
                yield f"{path.relative_to(ROOT)}:{node.lineno}", owner, name, node


def test_nothing_is_run_unpacked_or_downloaded():
    found = [
        (where, name)
        for where, owner, name, _ in calls()
        if name in FORBIDDEN_CALLS and not (name == "eval" and owner)  # a module's .eval()
    ]
    assert found == []
    for where, _, _, node in calls():
        risky = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in ("shell", "trust_remote_code")}
        assert "True" not in risky.values(), where
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    assert "json" in imported
    assert not imported & FORBIDDEN_MODULES


def test_torch_is_told_before_it_is_imported():
    code = "import megagpt, os, sys; print(os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'], 'torch' in sys.modules)"
    env = {key: value for key, value in os.environ.items() if key != "TORCH_FORCE_WEIGHTS_ONLY_LOAD"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "False"], done.stderr


ENDLESS = {"vocab_size": 300, "seq_len": 16, "n_layer": 10**9, "n_head": 1, "d_model": 1}


def test_weights_that_describe_an_endless_model_are_refused_before_it_is_built(tmp_path):
    from megagpt.config.fields import TrainSettings
    from megagpt.finetune import weights
    from megagpt.train.plan import _source

    path = tmp_path / "gpt.safetensors"
    spec = {"task": "t", "kind": "classify", "labels": ["a"], "n_outputs": 1, "head": "linear", "head_dropout": 0.0}
    about = {"config": json.dumps(ENDLESS), "tokenizer_sha256": "0" * 64}
    save_file({"wte.weight": np.zeros((300, 1), np.float32)}, path, metadata=about)
    with pytest.raises(CheckpointError, match=r"describes a model of [0-9,]+ parameters and has [0-9,]+ bytes"):
        _source(TrainSettings(ds_config="x", data=("x",), run_dir="x", init_from=str(path)))
    save_file({"wte.weight": np.zeros((300, 1), np.float32)}, path, metadata={**about, "task": json.dumps(spec)})
    with pytest.raises(CheckpointError, match=r"describes a model of [0-9,]+ parameters and has [0-9,]+ bytes"):
        weights.load(path, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "[" * 100_000}, "recursion"),
        ({"task": "[]"}, "no JSON object"),
        ({"task": '{"kind": "classify"}'}, "missing"),
        ({"config": '{"n_layer": "2"}'}, "a model needs vocab_size"),
        ({"tokenizer_sha256": None}, "tokenizer_sha256"),
    ],
    ids=["deep", "list", "fields missing", "shape missing", "tokenizer missing"],
)
def test_a_model_that_does_not_say_what_it_is_is_refused(changes, words, tmp_path):
    from megagpt.finetune.weights import described

    config = {"vocab_size": 30, "seq_len": 16, "n_layer": 1, "n_head": 1, "d_model": 2}
    spec = {"task": "t", "kind": "classify", "labels": ["a"], "n_outputs": 1, "head": "linear", "head_dropout": 0.0}
    good = {"config": json.dumps(config), "task": json.dumps(spec), "tokenizer_sha256": "0" * 64}
    assert described(good, tmp_path, n_bytes=10_000)[0].kind == "classify"
    about = {key: value for key, value in {**good, **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"does not say what its weights are of \(.*{words}"):
        described(about, tmp_path, n_bytes=10_000)


def test_every_test_that_the_document_names_is_there():
    text = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)`", text))
    assert len(named) > 8
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
    from fuzz_targets import TARGETS

    fuzzed = {name for row in re.findall(r"fuzzing: ([^|]+)", text) for name in re.findall(r"`(\w+)`", row)}
    assert fuzzed <= TARGETS.keys()
    assert len(fuzzed) > 8
