"""Keys and passwords stay out of what a run writes and prints, and ranks get a list of variables."""

import json
import os
import subprocess
import sys

import pytest

from megagpt import dist
from megagpt.dist.environment import for_ranks
from megagpt.secrets import HIDDEN, hide, names_a_secret, without_secrets
from megagpt.train import report
from megagpt.train.log import RunLog

KEY = "0123456789abcdef-very-private"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db-password", "GIT_PASSWORD"])
def test_a_secret_is_known_by_its_name(name):
    assert names_a_secret(name)


@pytest.mark.parametrize("name", ["max_tokens", "TOKENIZERS_PARALLELISM", "tokenizer", "key", "document_tokens"])
def test_other_names_are_no_secrets(name):
    assert not names_a_secret(name)


def test_values_of_the_environments_secrets_are_hidden_in_any_text():
    env = {"WANDB_API_KEY": KEY, "SHORT_TOKEN": "ab", "HOME": "/home/someone"}
    assert hide(f"refused: {KEY}, ab, /home/someone", env) == f"refused: {HIDDEN}, ab, /home/someone"


def test_values_under_a_secrets_name_are_hidden():
    command = ["train.py", "--api_key", KEY, "--max_tokens", "5", f"--token={KEY}", f"HF_TOKEN={KEY}", "--lr", "1"]
    found = without_secrets({"command": command, "comet": {"api_key": KEY, "project": "p"}, "tokens": 3})
    assert KEY not in json.dumps(found)
    assert found["command"][:1] + found["command"][3:5] + found["command"][-2:] == [
        *("train.py", "--max_tokens", "5"),
        *("--lr", "1"),
    ]
    assert (found["comet"]["project"], found["tokens"]) == ("p", 3)


def test_run_json_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["train.py", "--wandb_token", "of-another-kind", "--data", "x"])
    described = {"settings": {"run_dir": f"runs/{KEY}"}, "model": {"n_layer": 2}}
    report.write_run(tmp_path, described, start_step=0, world_size=1)
    text = (tmp_path / report.RUN).read_text()
    assert KEY not in text
    assert "of-another-kind" not in text
    assert json.loads(text)["model"] == {"n_layer": 2}
    assert json.loads(text)["starts"][0]["command"] == ["train.py", "--wandb_token", HIDDEN, "--data", "x"]


def test_what_fails_is_told_without_secrets(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    class Monitor:
        def write_events(self, events):
            raise ConnectionError(f"https://api?key={KEY} refused")

    with RunLog(tmp_path, total_steps=1, is_main=True, monitor=Monitor()) as log:
        log.valid("v", {"loss": 1.0}, 1)

    def fails():
        raise RuntimeError(f"no such key {KEY}")

    assert dist.run_main(fails) == 1
    told = capsys.readouterr()
    assert "the monitor failed" in told.out
    assert "no such key" in told.err
    assert KEY not in told.out + told.err


def test_ranks_get_a_list_of_variables_and_what_the_user_names():
    env = {"PATH": "p", "NCCL_DEBUG": "INFO", "LD_PRELOAD": "evil.so", "AWS_SECRET_ACCESS_KEY": KEY, "HF_HOME": "h"}
    assert for_ranks(env) == {"PATH": "p", "NCCL_DEBUG": "INFO"}
    assert for_ranks({**env, "MEGAGPT_EXPORT": "HF_HOME"}).keys() == {"PATH", "NCCL_DEBUG", "MEGAGPT_EXPORT", "HF_HOME"}


def test_megagpt_launch_passes_that_list_on(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os; print(sorted(os.environ))")
    code = "import sys; from megagpt.cli import main; sys.exit(main(sys.argv[1:]))"

    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "A_PRIVATE_TOKEN": KEY, "OTHER": "x", "MEGAGPT_EXPORT": "OTHER"}
    command = [sys.executable, "-c", code, "launch", "--num_gpus", "1", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "'OTHER'" in done.stdout
    assert "'RANK'" in done.stdout
    assert "A_PRIVATE_TOKEN" not in done.stdout
