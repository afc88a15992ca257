"""What the flags of a run change: previews, seeds, studies of transfer, long documents, early stops."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import finetune, run_ranks
from finetune_common import ds_config, pretrained, train_all, write_csv
from safetensors.torch import load_file

from megagpt.errors import ConfigError
from megagpt.finetune.fields import parse
from megagpt.finetune.main import main
from megagpt.finetune.several import runs_of, tasks_of


def arguments(home: Path, *more) -> list[str]:
    train, valid = write_csv(home / "my.csv", 24), write_csv(home / "dev.csv", 9, 1)
    files = ["--train", train, "--valid", valid, "--init_from", pretrained("pre"), "--run_dir", home / "run"]
    words = ["--ds_config", ds_config(home, 1), *files, "--global_batch_size", 8, "--log_interval", 1, *more]
    return [str(word) for word in words]


def test_a_preview_shows_phases_and_rates_and_trains_nothing(tmp_path, capsys):
    assert main(arguments(tmp_path, "--recipe", "ulmfit", "--preview")) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("recipe ulmfit, head pooled_mlp: ")
    groups = ["embeddings", "lower", "middle", "upper", "head"]
    assert shown[1].split() == ["phase", "objective", "epochs", "updates", *groups]
    rows = [line.split() for line in shown[2:14:2]]  # each with its curve below
    assert [row[0] for row in rows] == ["language", "head", "+upper", "+middle", "+lower", "+embeddings"]
    begins = int(rows[1][3].partition("-")[0])
    assert rows[1] == ["head", "task", "1", f"{begins}-{begins + 3}", "-", "-", "-", "-", "0.01"]
    assert rows[-1][-6:] == [f"{begins + 12}-{begins + 15}", "0.0002188", "0.000569", "0.001479", "0.003846", "0.01"]
    assert not (tmp_path / "run" / "run.json").exists()
    assert {path.name for path in tmp_path.glob("run/*")} <= {"schedule.png"}


def test_several_seeds_are_runs_of_their_own(tmp_path):
    codes, output = finetune(arguments(tmp_path, "--seeds", "3,5", "--epochs", 1), 2)
    assert codes == [0, 0], output
    summaries = [json.loads((tmp_path / "run" / f"seed{s}" / "summary.json").read_text()) for s in (3, 5)]
    assert [s["seed"] for s in summaries] == [3, 5]
    first, second = (load_file(tmp_path / "run" / f"seed{s}" / "model.safetensors") for s in (3, 5))
    assert not torch.equal(first["head.output.weight"], second["head.output.weight"])


def write_tsv(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.replace(" | ", "\t") + "\n" for row in rows))


def test_several_tasks_are_runs_of_their_own_and_are_looked_for_first(tmp_path):
    flags = arguments(tmp_path, "--task", "sst2,rte", "--task_data", tmp_path / "glue", "--epochs", 1)
    own = [i for name in ("--train", "--valid") for i in (flags.index(name), flags.index(name) + 1)]
    flags = [word for i, word in enumerate(flags) if i not in own]
    for split, n in (("train", 16), ("dev", 4)):
        rows = [f"{('good', 'bad')[i % 2]} number {i} | {i % 2}" for i in range(n)]
        write_tsv(tmp_path / "glue" / "SST-2" / f"{split}.tsv", "sentence | label", *rows)
    codes, output = finetune(flags)
    assert codes == [2], output
    assert "has no train.tsv of task rte" in output
    assert not (tmp_path / "run").exists()
    for split, n in (("train", 16), ("dev", 4)):
        rows = [f"{i} | a {i} | b {i} | {('entailment', 'not_entailment')[i % 2]}" for i in range(n)]
        write_tsv(tmp_path / "glue" / "RTE" / f"{split}.tsv", "index | sentence1 | sentence2 | label", *rows)
    codes, output = finetune(flags)
    assert codes == [0], output
    found = {task: json.loads((tmp_path / "run" / task / "summary.json").read_text()) for task in ("sst2", "rte")}
    assert all(summary["task"] == task for task, summary in found.items())


def test_glue_is_its_nine_tasks_and_each_may_have_several_seeds(tmp_path):
    from test_finetune_tasks import GLUE_FILES, write_glue

    nine = tasks_of("glue")
    assert len(nine) == 9
    assert tasks_of("rte, glue,rte") == ["rte", *(name for name in nine if name != "rte")]
    for name in ("cola", "rte"):
        write_glue(tmp_path, name)
    settings = parse([*arguments(tmp_path)[:2], "--task", "cola,rte", "--task_data", str(tmp_path), "--seeds", "1,2",
                      "--init_from", "x", "--run_dir", "runs"])  # fmt: skip
    places = [(run.task, run.seed, run.run_dir) for run in runs_of(settings)]
    assert places == [(task, seed, f"runs/{task}/seed{seed}") for task in ("cola", "rte") for seed in (1, 2)]
    assert GLUE_FILES.keys() <= set(nine)
    with pytest.raises(ConfigError, match=r"task 'rtte' is unknown \(did you mean 'rte'"):
        runs_of(replace(settings, task="cola,rtte"))


def test_an_empty_name_of_a_task_is_told_as_such():
    """As of a variable that is not set: it was a traceback."""
    words = ["--ds_config", "x", "--init_from", "x", "--run_dir", "x"]
    with pytest.raises(ConfigError, match="--task is empty"):
        parse([*words, "--task", "", "--task_data", "glue"])
    with pytest.raises(ConfigError, match="--train is empty"):
        parse([*words, "--train", "", "--valid", "x"])


@pytest.fixture(scope="module")
def transfers(tmp_path_factory) -> dict[int, dict]:
    """Weights after one update whose rate is 0, so as they were at the start, by the number of blocks taken over."""
    home = tmp_path_factory.mktemp("transfers")
    cases = []
    for k in (-1, 0, 1, 3):
        run_dir = home / f"k{k}"
        cases.append([*arguments(home, "--n_transfer", k, "--epochs", 1, "--global_batch_size", 24)])
        cases[-1][cases[-1].index("--run_dir") + 1] = str(run_dir)
        place = cases[-1].index("--global_batch_size")
        del cases[-1][place : place + 2]
    run_ranks(train_all, 1, cases)
    return {k: load_file(home / f"k{k}" / "model.safetensors") for k in (-1, 0, 1, 3)}


@pytest.mark.parametrize("k", [-1, 0, 1, 3])
def test_so_many_blocks_are_the_pre_trained_ones(transfers, k):
    source, found = load_file(pretrained("pre")), transfers[k]
    rows = len(source["wte.weight"])
    assert found["gpt.wte.weight"].shape[0] == rows + 3
    assert torch.equal(found["gpt.wte.weight"][:rows], source["wte.weight"]) == (k >= 0)
    assert torch.equal(found["gpt.wpe.weight"], source["wpe.weight"]) == (k >= 0)
    for i in range(3):
        name = f"blocks.{i}.attn.qkv.weight"
        assert torch.equal(found[f"gpt.{name}"], source[name]) == (i < k)
    task_rows = found["gpt.wte.weight"][rows:]
    assert 0.01 < task_rows.std() < 0.03  # new, and drawn like the others
    assert math.isclose(found["head.output.bias"].abs().max(), 0.0)


def test_documents_limits_and_an_early_stop(tmp_path):
    """Windows of 16 tokens over documents of 40, a half of the examples, and no better result after the first epoch."""
    more = ["--seq_len", 16, "--document_tokens", 40, "--limit_train", 0.5, "--lr", 1e-12, "--lm_coef", 0.1]
    more += ["--epochs", 5, "--patience", 2, "--global_batch_size", 4]
    argv = arguments(tmp_path, *more)
    place = argv.index("--global_batch_size")
    del argv[place : place + 2]
    rows = [f"{'time and people ' * 20}{('good', 'bad')[i % 2]},{('plus', 'minus')[i % 2]}" for i in range(24)]
    (tmp_path / "my.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    codes, output = finetune(argv, 2)
    assert codes == [0, 0], output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_examples"] == 12
    assert summary["head"] == "pooled_mlp"
    assert summary["best_epoch"] == 1
    assert summary["steps"] == 9  # three epochs of three updates
    assert summary["tokens"] == 9 * 4 * 42
