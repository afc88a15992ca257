"""Weights read out of checkpoints, and runs that start from them."""

import json
import shutil
from types import SimpleNamespace

import fork_server
import pytest
import torch
from checkpoint_common import arguments, folder, resume, shard
from corpora import write_bytes_corpus
from crash_disk import Disk
from disk_recorder import Recorder, read
from distributed import run_ranks
from safetensors.torch import save_file

from megagpt.errors import CheckpointError, StorageError
from megagpt.train import checkpoint, faults, kept_weights, safe
from megagpt.train.manifest import read_source
from megagpt.train.weights import read_weights


def differences_from_deepspeed(run):
    """Names of the weights that are not what DeepSpeed's own script puts together."""
    from megagpt.train.engine import import_deepspeed

    import_deepspeed()
    safe.allow_checkpoint_classes()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    theirs = get_fp32_state_dict_from_zero_checkpoint(str(run / "checkpoints"), tag="global_step2")
    ours, _ = read_weights(run)
    return [n for n in theirs.keys() | ours.keys() if n not in theirs or n not in ours or not theirs[n].equal(ours[n])]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_are_read_whole_from_any_stage_and_start_a_new_run(tmp_path, stage):
    run = tmp_path / "run"
    assert resume(run, ranks=2, stage=stage, max_steps=2)[0] == 0
    weights, settings = read_weights(run)
    assert settings["d_model"] == 32
    assert weights["wte.weight"].shape == (256, 32)
    if stage:
        assert run_ranks(differences_from_deepspeed, 1, run)[0][0] == []
    new = tmp_path / "new"
    code, output = resume(new, "--init_from", run, ranks=2, stage=3 - stage, max_steps=1, lr=1e-30, weight_decay=0)
    assert code == 0, output
    copied, _ = read_weights(new)
    assert copied.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(copied[name], weights[name], atol=0, rtol=0)


def test_weights_of_checkpoints_that_are_deleted_stay_where_that_is_asked_for(tmp_path):
    run, flags = tmp_path / "run", {"keep_last": 2, "keep_weights_interval": 2}
    code, output = resume(run, ranks=2, stage=3, max_steps=5, **flags)
    assert code == 0, output
    assert f"kept the weights of step 4 in {run / 'weights' / 'global_step4'}" in output
    assert not folder(run, 2).exists()
    assert sorted(path.name for path in (run / "weights").iterdir()) == ["global_step2", "global_step4"]
    kept, settings = read_weights(run / "weights" / "global_step4")
    saved, theirs = read_weights(folder(run, 4))
    assert settings == theirs
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    earlier, _ = read_weights(run / "weights" / "global_step2")
    assert not torch.equal(earlier["wte.weight"], kept["wte.weight"])
    assert read_source(run / "weights" / "global_step2") == read_source(run)


def test_weights_that_a_killed_start_did_not_come_to_are_kept_by_the_next_one(tmp_path):
    """The run goes on behind that checkpoint: its weights were never kept, and nothing said so."""
    run, flags = tmp_path / "run", {"keep_last": 2, "keep_weights_interval": 2}
    with fork_server.train(arguments(run, **flags), 1, env={faults.VARIABLE: "committed:0:2"}) as job:
        assert job.wait() == [-9], job.output()
    assert not (run / "weights").exists()
    (run / "weights" / ".tmp-global_step2").mkdir(parents=True)
    code, output = resume(run, ranks=1, max_steps=4, **flags)
    assert code == 0, output
    assert sorted(path.name for path in (run / "weights").iterdir()) == ["global_step2", "global_step4"]
    assert not folder(run, 2).exists()
    weights, _ = read_weights(run / "weights" / "global_step2")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert "kept" not in resume(run, ranks=1, max_steps=4, **flags)[1]


def _keep_recorded(run) -> str:
    """Keeps the weights of a run's newest checkpoint; in a process of its own, for a recorder stays."""
    out = run.with_name("recorded")
    out.mkdir()
    files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    folders = [str(p.relative_to(run)) for p in run.rglob("*") if p.is_dir()]
    Recorder(str(run), out)
    told = kept_weights.keep(folder(run, 4), is_new=True)
    recording = read(out, files, folders)
    disk = Disk(recording)
    for event in recording.events:
        disk.do(event)
    left = disk.crash([False] * len(disk.pending), lambda node, file: b"")
    for path in (run / "weights").rglob("*.*"):
        name = str(path.relative_to(run))
        assert left.get(name) == path.read_bytes(), f"{name} is lost: {sorted(left)}"
    return told


def test_kept_weights_are_there_after_a_loss_of_power(run_dir):
    """Their checkpoint may be deleted next."""
    ((told, _),) = run_ranks(_keep_recorded, 1, run_dir)
    assert "kept the weights of step 4" in told


def test_weights_that_cannot_be_kept_are_told_and_cost_nothing(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "weights").write_text("in the way")
    code, output = resume(run, ranks=1, max_steps=2, keep_weights_interval=1)
    assert code == 0, output
    assert "WARNING: the weights of global_step2 cannot be kept, going on: " in output
    assert folder(run, 2).exists()


def test_a_start_counts_the_weights_that_it_will_keep(tmp_path, monkeypatch):
    """A disk with room for a checkpoint alone was taken for large enough."""
    (tmp_path / "weights" / "global_step4").mkdir(parents=True)
    assert kept_weights.bytes_to_come(tmp_path, 1_000_000, 13, 2) == 5 * 4_000_000
    assert kept_weights.bytes_to_come(tmp_path, 1_000_000, 13, 0) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=17_000_000))
    checkpoint.check_space(tmp_path, 14_000_000)
    with pytest.raises(StorageError, match=r"takes about 14.0 MB, and the weights kept of it 4.0 MB; free some"):
        checkpoint.check_space(tmp_path, 14_000_000, 4_000_000)
    (warning,) = kept_weights.space_warnings(tmp_path, 10_000_000, 8_000_000)
    assert "has 17.0 MB free" in warning
    assert "take about 8.0 MB beside a checkpoint of 10.0 MB" in warning
    assert kept_weights.space_warnings(tmp_path, 10_000_000, 7_000_000) == []


def test_weights_of_a_16_bit_run_are_read_as_they_are_updated_and_not_as_they_are_rounded(tmp_path):
    run = tmp_path / "run"
    assert resume(run, ranks=1, stage=0, max_steps=2, precision="bf16")[0] == 0
    weights, _ = read_weights(run)
    saved = torch.load(folder(run, 2) / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert weights.keys() == saved.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.bfloat16(), saved[name]), name
    assert not torch.equal(weights["wte.weight"], saved["wte.weight"].float())


def test_a_newer_checkpoint_that_is_damaged_is_told(run_dir, capsys):
    """An older model than the user had in mind was read, and nothing said so."""
    expected, _ = read_weights(folder(run_dir, 3))
    shard(run_dir, 4).write_bytes(b"")
    capsys.readouterr()
    found, _ = read_weights(run_dir)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "warning: skipped checkpoint global_step4: " in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"global_step4 cannot be used: zero_pp_rank_1.* has 0 bytes"):
        read_weights(folder(run_dir, 4))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weights: weights.pop("wpe.weight"), "there is none"),
        (lambda weights: weights.update({"wpe.weight": torch.zeros(3, 32)}), "there is one of shape (3, 32)"),
    ],
    ids=["missing", "misshapen"],
)
def test_weights_that_are_not_what_their_file_says_are_refused_on_all_ranks(finished, tmp_path, damage, words):
    weights, config = read_weights(finished)
    damage(weights)
    save_file(weights, tmp_path / "w.safetensors", metadata={"config": json.dumps(config)})
    code, output = resume(tmp_path / "new", init_from=tmp_path / "w.safetensors", stage=3)
    assert code == 3, output
    assert "wpe.weight should have the shape (16, 32) and" in output
    assert words in output
    assert output.count("error:") == 1
    assert "Traceback" not in output


def test_weights_do_not_start_a_run_on_text_of_another_tokenizer(run_dir, tmp_path):
    """Sizes of vocabularies agree more often than their tokens."""
    write_bytes_corpus(tmp_path / "other", [b"some other text " * 50], tokenizer_sha256="1" * 64)
    code, output = resume(tmp_path / "new", init_from=run_dir, data=tmp_path / "other", ranks=1)
    assert code == 2
    assert f"other was made with another tokenizer than the text that {run_dir} was trained on" in output
    assert not (tmp_path / "new").exists()


def test_init_from_refuses_another_shape_and_an_empty_folder(run_dir, tmp_path):
    code, output = resume(tmp_path / "new", "--init_from", run_dir, ranks=1, n_layer=2)
    assert code == 2
    assert "n_layer 2 (the weights have 1)" in output
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read_weights(tmp_path)
