"""Fine-tuned models in transformers: the same answers for the same texts, or one sentence why there is no such form."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from export_common import names_in, ops, randomised, tokenizer_of
from safetensors.torch import load_file, save_file

from megagpt.errors import CheckpointError, ConfigError
from megagpt.export.main import export_main
from megagpt.finetune import evaluation, weights
from megagpt.finetune.batches import Encoded
from megagpt.finetune.examples import Example
from megagpt.finetune.inputs import transform_for
from megagpt.finetune.model import Classifier
from megagpt.finetune.spec import TaskSpec
from megagpt.model.config import GPTConfig

TEXTS = ["The cat's whiskers weren't wet.", "So", "It is 3.14, isn't it? " * 3]
SPEC = TaskSpec("mine", "classify", ("no", "yes", "perhaps"), 3, "linear", 0.1)
KINDS = {
    "classify": SPEC,
    "entail": replace(SPEC, kind="entail", text_columns=("a", "b")),
    "multilabel": replace(SPEC, kind="multilabel"),
    "regress": replace(SPEC, kind="regress", labels=(), n_outputs=1, shift=3.5, scale=1.7),
}


def finetuned(folder, spec, norm, extra_rows=0):
    """A run folder as finetune.py leaves it."""
    folder.mkdir()
    tokenizer = tokenizer_of(norm)
    tokenizer.save(folder / "tokenizer.json")
    rows = tokenizer.vocab_size + extra_rows + 3
    config = GPTConfig(vocab_size=rows, seq_len=128, n_layer=2, n_head=2, d_model=32, norm=norm)
    state = Classifier(config, spec, ops()).state_dict()
    about = {"config": json.dumps(config.to_dict()), "task": json.dumps(spec.to_dict())}
    save_file(randomised(state), folder / "model.safetensors", metadata=about | {"tokenizer_sha256": tokenizer.sha256})
    return folder, tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["pre", "post"])
@torch.no_grad()
def test_a_batch_of_texts_gets_the_answers_of_predict(tmp_path, kind, norm):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, tokenizer = finetuned(tmp_path / "run", KINDS[kind], norm, extra_rows=5 * (kind == "classify"))
    assert export_main(["--from", str(run), "--to", str(tmp_path / "out")]) == 0
    ours, _ = weights.load(run / "model.safetensors", "cpu")
    pairs = [(text, TEXTS[0]) if kind == "entail" else (text,) for text in TEXTS]
    transform = transform_for(ours.spec, tokenizer, ours.gpt.config)
    encoded = Encoded([transform.units(Example(str(i), texts)) for i, texts in enumerate(pairs)], None)
    expected, _ = evaluation.answers(ours, encoded, device="cpu")

    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    columns = [list(column) for column in zip(*pairs, strict=True)]
    logits = theirs(**their_tokenizer(*columns, padding=True, return_tensors="pt")).logits
    found = {"multilabel": logits.sigmoid(), "regress": logits[:, 0]}.get(kind, logits.softmax(-1))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.02
    if kind != "regress":
        assert theirs.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}


REFUSED = {
    "another head": (replace(SPEC, head="pooled_mlp"), "its head is pooled_mlp"),
    "both orders": (replace(SPEC, kind="similar"), "both orders of its two texts"),
    "a score of two texts": (replace(KINDS["regress"], text_columns=("a", "b")), "both orders of its two texts"),
    "choices": (replace(SPEC, kind="choose", labels=(), n_outputs=1), "the choices of a question"),
    "a hierarchy": (replace(SPEC, kind="multilabel", parents=(None, 0, 0)), "its labels are a hierarchy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_does_not_compute_is_refused_with_the_reason(tmp_path, case):
    spec, reason = REFUSED[case]
    run, _ = finetuned(tmp_path / "run", spec, "pre")
    with pytest.raises(CheckpointError, match=f"{reason}.*megagpt predict"):
        export_main(["--from", str(run), "--to", str(tmp_path / "out")])
    assert names_in(tmp_path) == ["run"]


def test_a_fine_tuned_model_is_written_in_fp32_alone(tmp_path):
    run, _ = finetuned(tmp_path / "run", SPEC, "pre")
    with pytest.raises(ConfigError, match="--dtype bf16 is for language models"):
        export_main(["--from", str(run), "--to", str(tmp_path / "out"), "--dtype", "bf16"])


def test_a_bias_that_no_layer_norm_can_take_over_is_refused(tmp_path):
    run, _ = finetuned(tmp_path / "run", SPEC, "pre")
    path = run / "model.safetensors"
    state = load_file(path)
    state["head.output.weight"][1] = state["head.output.weight"][0]  # its bias differs
    with weights.manifest.open_safetensors(path, framework="np") as file:
        about = file.metadata()
    save_file(state, path, metadata=about)
    with pytest.raises(CheckpointError, match="the rows of its weights depend on each other"):
        export_main(["--from", str(run), "--to", str(tmp_path / "out")])
