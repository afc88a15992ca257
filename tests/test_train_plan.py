"""What a run will do, settled before it starts."""

import json

import pytest
from corpora import tiny_corpus

from megagpt.config.deepspeed import load
from megagpt.config.fields import parse
from megagpt.data.indexed import IndexedDataset
from megagpt.dist import resolve_world
from megagpt.errors import ConfigError
from megagpt.train.corpus import data_lines
from megagpt.train.plan import make_plan


def planned(folder, *flags):
    config = folder / "ds.json"
    config.write_text(json.dumps({"train_batch_size": 8}))
    words = ["--ds_config", config, "--data", tiny_corpus(), "--run_dir", folder / "run", *flags]
    settings = parse([str(word) for word in words])
    return make_plan(settings, load(str(config)), resolve_world({}))


def test_gpt1_trains_as_long_as_its_paper_says_unless_told_otherwise(tmp_path):
    n_tokens = IndexedDataset(tiny_corpus()).n_tokens
    plan = planned(tmp_path, "--model", "gpt1")
    assert plan.total_steps == 100 * n_tokens // (8 * 512)
    assert planned(tmp_path, "--model", "gpt1", "--epochs", 2).total_steps == 2 * n_tokens // (8 * 512)
    assert planned(tmp_path, "--model", "gpt1", "--max_steps", 7).total_steps == 7


def test_the_models_of_2020_train_300_billion_tokens_unless_told_otherwise(tmp_path):
    assert planned(tmp_path, "--model", "1.3b").total_steps == 300 * 10**9 // (8 * 2048)


@pytest.mark.parametrize("model", ["tiny", "gpt2-small"])
def test_where_no_length_was_published_one_is_asked_for(tmp_path, model):
    with pytest.raises(ConfigError, match="give --max_steps, --max_tokens or --epochs"):
        planned(tmp_path, "--model", model)


def test_flags_change_the_dropout_of_a_preset(tmp_path):
    def rates(*flags):
        model = planned(tmp_path, "--max_steps", 1, *flags).model
        return model.embd_dropout, model.attn_dropout, model.resid_dropout, model.embd_dropout_mode

    assert rates() == (0.1, 0.1, 0.1, "sum")
    assert rates("--dropout", 0.2, "--attn_dropout", 0) == (0.2, 0.0, 0.2, "sum")
    assert rates("--embd_dropout_mode", "matrix") == (0.1, 0.1, 0.1, "matrix")


def test_a_short_run_has_a_short_warm_up(tmp_path):
    assert planned(tmp_path, "--max_steps", 100).schedule.warmup_steps == 10
    assert planned(tmp_path, "--max_steps", 100, "--warmup_steps", 60).schedule.warmup_steps == 60


def test_the_log_says_what_a_run_sees_of_each_corpus(tmp_path):
    plan = planned(tmp_path, "--model", "tiny", "--max_steps", 10)
    n_windows = plan.corpora.train.n_windows
    (line,) = data_lines(plan.corpora, 3 * n_windows)
    assert line == f"data {tiny_corpus()}: {3 * n_windows:,} samples, 3 epochs"


def test_a_validation_set_that_is_trained_on_is_told(tmp_path):
    sets = [f"seen={tiny_corpus()}", f"unseen={tiny_corpus()}-valid"]
    plan = planned(tmp_path, "--model", "tiny", "--max_steps", 10, "--valid_data", *sets)
    warnings = [line for line in data_lines(plan.corpora, 80) if "WARNING" in line]
    assert warnings == ["WARNING: the validation set seen is trained on as well; its losses say nothing"]
