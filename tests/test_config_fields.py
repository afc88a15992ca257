"""The flags of train.py: names, aliases, checks, and one line for each mistake."""

import dataclasses
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import fields
from megagpt.config.fields import TrainSettings, parse
from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError
from megagpt.evaluate.main import GenerateSettings
from megagpt.tools.plan import PlanSettings

NEEDED = ["--ds_config", "x.json", "--data", "corpus", "--run_dir", "runs/x"]


def message(*flags):
    with pytest.raises(ConfigError) as caught:
        parse([*NEEDED, *flags])
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_choices_of_a_flag_that_may_be_left_out_are_those_it_takes():
    """Python's None stood among them, in an order that changed from call to call."""
    with pytest.raises(ConfigError) as caught:
        parse_flags(PlanSettings, ["--model", "gpt1", "--gpu", "x", "--precision", "fp64"], prog="megagpt plan")
    assert "choose one of bf16, fp16, fp32; megagpt plan --help" in str(caught.value)


def test_help_shows_no_flag_that_is_refused(capsys):
    """It offered --no_no_cache."""
    with pytest.raises(SystemExit):
        parse_flags(GenerateSettings, ["--help"], prog="megagpt generate")
    shown = capsys.readouterr().out
    flags = set(re.findall(r"--(\w+)", shown)) - {"help"}
    assert flags == {field.name.rstrip("_") for field in dataclasses.fields(GenerateSettings)}


def test_underscores_and_dashes_name_the_same_flag():
    assert parse([*NEEDED, "--n-layer", "3"]) == parse([*NEEDED, "--n_layer=3"])


def test_megatrons_names_of_the_same_things_are_understood():
    theirs = "--num-layers 3 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 99 --seq-length 32 --bf16"
    theirs += " --train-iters 7 --lr-warmup-iters 2 --eval-iters 5 --adam-eps 1e-5 --attention-dropout 0.2"
    ours = "--n_layer 3 --d_model 64 --n_head 4 --d_ff 99 --seq_len 32 --precision bf16"
    ours += " --max_steps 7 --warmup_steps 2 --eval_steps 5 --eps 1e-5 --attn_dropout 0.2"
    needed = [*NEEDED[:2], "--data-path", "corpus", *NEEDED[4:]]
    assert parse([*needed, *theirs.split()]) == parse([*NEEDED, *ours.split()])
    assert parse([*NEEDED, "--fp16"]).precision == "fp16"


def test_megatrons_names_of_other_things_are_answered_with_what_serves_here():
    text = message("--clip-grad", "1.0", "--tensor-model-parallel-size", "2", "--lr_decay", "x")
    assert text.startswith("unknown flag --clip_grad (here: gradient_clipping in the DeepSpeed file), ")
    assert "--tensor_model_parallel_size (here: ZeRO-3 splits large models)" in text
    known = {*TrainSettings.__dataclass_fields__, *fields.ALIASES}
    assert not known & fields._ELSEWHERE.keys()  # where one becomes a flag its hint has to go


def test_weights_can_be_kept_only_of_what_is_saved():
    assert parse([*NEEDED, "--keep_weights_interval", "4000"]).keep_weights_interval == 4000
    assert "no multiple of --save_interval" in message("--keep_weights_interval", "1500")
    assert "no multiple of --save_interval" in message("--keep_weights_interval", "5", "--save_interval", "0")


@pytest.mark.parametrize("name", ["--ds_config", "--ds-config", "--deepspeed_config", "--deepspeed"])
def test_the_deepspeed_file_has_the_names_that_launchers_and_tuners_use(name):
    assert parse([name, "y.json", *NEEDED[2:]]).ds_config == "y.json"


def test_the_bare_deepspeed_switch_of_the_tutorials_is_accepted():
    assert parse(["--deepspeed", "--deepspeed_config", "y.json", *NEEDED[2:]]).ds_config == "y.json"


@pytest.mark.parametrize(
    "argv",
    [
        ["--local_rank=1", *NEEDED],
        ["--local_rank", "1", *NEEDED],
        [*NEEDED, "--local-rank=1"],
        [*NEEDED, "--local_rank"],
    ],
    ids=str,
)
def test_local_rank_is_accepted_anywhere_and_ignored(argv):
    assert parse(argv) == parse(NEEDED)


def test_activation_checkpointing_needs_no_number_to_recompute_every_block():
    assert parse([*NEEDED, "--activation_checkpointing"]).activation_checkpointing == 1
    assert parse([*NEEDED, "--activation_checkpointing", "--seed", "7"]).activation_checkpointing == 1
    assert parse([*NEEDED, "--activation_checkpointing", "3"]).activation_checkpointing == 3


def test_several_values_follow_one_flag():
    read = parse([*NEEDED[:2], "--data", "0.7", "a", "0.3", "b", "--betas", "0.9", "0.95", "--run_dir", "r"])
    assert read.blend() == [(0.7, "a"), (0.3, "b")]
    assert read.betas == (0.9, 0.95)


def test_one_corpus_has_weight_one():
    assert parse(NEEDED).blend() == [(1.0, "corpus")]


def test_validation_sets_are_named():
    read = parse([*NEEDED, "--valid_data", "books=data/a=b", "code=data/c"])
    assert read.valid_sets() == {"books": "data/a=b", "code": "data/c"}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--n_layers", "3"], ["--n_layers", "'--n_layer'"]),
        (["-lr", "3"], ["-lr", "'--lr'"]),
        (["--warmupsteps=3", "--sedd", "1"], ["'--warmup_steps'", "'--seed'"]),
        (["--lr", "fast"], ["--lr takes FLOAT, not 'fast'"]),
        (["--n_layer", "1.5"], ["--n_layer takes INT, not '1.5'"]),
        (["--betas", "0.9"], ["--betas takes FLOAT FLOAT"]),
        (["--lr"], ["--lr"]),
        (["--kernels", "cuda"], ["cuda", "triton"]),
        (["--lr", "-1"], ["--lr -1 must be above 0"]),
        (["--lr", "nan"], ["--lr nan must be above 0"]),
        (["--dropout", "1"], ["--dropout 1 must be at least 0 and below 1"]),
        (["--n_layer", "0"], ["--n_layer 0 must be at least 1"]),
        (["--n_layer", "9" * 40], ["--n_layer", "below"]),
        (["--betas", "0.9", "1"], ["--betas 0.9 1 must be"]),
        (["--max_steps", "3", "--epochs", "1"], ["--max_steps and --epochs"]),
        (["--lr", "1e-4", "--min_lr", "1e-3"], ["--min_lr 0.001 is above --lr 0.0001"]),
        (["--valid_data", "books"], ["'books' is not NAME=PREFIX"]),
        (["--valid_data", "a=x", "a=y"], ["two sets 'a'"]),
        (["--valid_data", "../a=x"], ["'../a=x' is not NAME=PREFIX"]),
        (["--valid_data", "a=x", "--valid_data", "b=y"], ["--valid_data is given 2 times"]),
        (["--resume", ""], ["--resume is empty"]),
        (["--resume", "m.safetensors"], ["--resume m.safetensors has weights", "--init_from"]),
        (["stray"], ["'stray'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_is_told_in_one_line(flags, parts):
    text = message(*flags)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    "data", [["0.5", "a", "b"], ["a", "b"], ["0", "a", "1", "b"], ["nan", "a", "1", "b"], []], ids=str
)
def test_a_blend_is_pairs_of_a_positive_weight_and_a_prefix(data):
    with pytest.raises(ConfigError, match=r"--data .* pairs of a positive weight and a prefix"):
        parse(["--ds_config", "x", "--run_dir", "r", "--data", *data])


def test_missing_flags_are_told_together():
    with pytest.raises(ConfigError, match=r"train\.py needs --run_dir and --data;"):
        parse(["--ds_config", "x"])


def test_all_wrong_numbers_are_told_at_once():
    text = message("--n_layer", "0", "--lr", "-1", "--save_interval", "-1", "--seed", "-1")
    assert all(flag in text for flag in ("--n_layer 0", "--lr -1", "--save_interval -1", "--seed -1"))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([*NEEDED, "--lr", "--betas", "--n_layer", "-1", "="]), st.text()), max_size=8)
)
def test_any_arguments_give_settings_or_a_config_error(argv):
    argv = [word for word in argv if word not in ("-h", "--help")]
    with suppress(ConfigError):
        assert isinstance(parse(argv), TrainSettings)


def test_help_names_every_flag_and_imports_no_torch():
    code = (
        "import sys\nfrom megagpt.config.fields import parse\n"
        "try: parse(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    for name in TrainSettings.__dataclass_fields__:
        assert re.search(rf"--{name}[ ,]", shown.stdout), name
    assert "--deepspeed_config" in shown.stdout
    assert "default: None" not in shown.stdout
    assert "number of blocks" in shown.stdout
    assert "gpt2-small|medium|large|xl" in shown.stdout
    assert "1234)" in shown.stdout  # a default that says something


def test_one_of_several_ranks_answers_help(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert not stop.value.code
    assert capsys.readouterr().out == ""
