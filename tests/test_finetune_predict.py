"""``megagpt predict``: what it says of folders that hold no fine-tuned model."""

import pytest

from megagpt.errors import CheckpointError
from megagpt.finetune.predict import predict_main


def test_a_run_that_was_not_fine_tuned_is_told_to_need_finetune(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"model.safetensors does not exist; give the folder .*finetune\.py"):
            predict_main(["--from", str(folder), "--input", "new.csv", "--output", str(tmp_path / "out.tsv")])
