"""What a checkpoint survives, what is refused, and what is kept: one small run, then everything done to its folder."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from checkpoint_common import arguments, flip_a_bit, folder, resume, shard
from corpora import tiny_corpus, write_bytes_corpus
from distributed import train

from megagpt.train import checkpoint, manifest


def test_a_checkpoint_lists_every_file_and_says_what_it_is_of(finished):
    header = manifest.read(folder(finished, 4))
    on_disk = {str(p.relative_to(folder(finished, 4))) for p in folder(finished, 4).rglob("*") if p.is_file()}
    assert set(header["files"]) | {manifest.MANIFEST} == on_disk
    assert (header["step"], header["world_size"], header["zero_stage"], header["precision"]) == (4, 2, 1, "fp32")
    assert header["data"]["train"][0]["n_tokens"] > 1000
    assert (finished / "checkpoints" / "latest").read_text() == "global_step4"
    assert not list((finished / "checkpoints").glob(".tmp*"))


def test_damaged_checkpoints_are_passed_over_by_name_and_the_next_older_one_is_taken(run_dir):
    flip_a_bit(shard(run_dir, 4))
    shutil.copy(shard(run_dir, 3, rank=0), shard(run_dir, 3, rank=1))
    code, output = resume(run_dir)
    assert code == 0, output
    assert "skipped checkpoint global_step4: zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged" in output
    assert "skipped checkpoint global_step3: zero_pp_rank_1" in output
    assert "step 2 of 6" in output
    assert manifest.problem(folder(run_dir, 4)) is None, "the resumed run has written step 4 anew"


def test_damaged_checkpoints_do_not_crowd_out_good_ones(run_dir):
    """They were counted among the newest to keep, and good ones were deleted in their place."""
    flip_a_bit(shard(run_dir, 4))
    flip_a_bit(shard(run_dir, 3))
    code, output = resume(run_dir, max_steps=5, save_interval=0, keep_last=2)
    assert code == 0, output
    assert [manifest.step_of(f) for f in manifest.folders(run_dir / "checkpoints")] == [5, 4, 3, 2]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_again_from_nothing(run_dir):
    for step in range(1, 5):
        (folder(run_dir, step) / manifest.MANIFEST).unlink()
    code, output = resume(run_dir)
    assert code == 3
    assert output.count("error: no checkpoint under") == 1
    assert "Traceback" not in output


def test_latest_is_only_a_hint(run_dir):
    (run_dir / "checkpoints" / "latest").write_text("../../outside")
    code, output = resume(run_dir)
    assert code == 0
    assert "step 4 of 6" in output


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({"d_model": 64}, 2, "is of another model: d_ff 128 there and 256 now, d_model 32 there and 64 now"),
        ({"seed": 5}, 2, "is of other data: seed 1234 there and 5 now"),
        ({"stage": 3}, 2, "ZeRO stage 1 in the checkpoint and 3 now"),
        ({"stage": 2}, 1, "number of ranks 2 in the checkpoint and 1 now, ZeRO stage 1 in the checkpoint and 2 now"),
        ({"precision": "bf16"}, 2, "precision fp32 in the checkpoint and bf16 now"),
        ({"resume": "never"}, 2, "already holds checkpoints (newest global_step4) and --resume is never"),
        ({"resume": "nowhere"}, 2, "nowhere does not exist"),
        ({"max_steps": 3}, 2, "is at step 4 and the run ends at 3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_run_folder_of_something_else_is_refused_in_one_sentence(run_dir, changes, ranks, words):
    before = sorted(p.name for p in run_dir.rglob("*"))
    code, output = resume(run_dir, ranks=ranks, **changes)
    assert code in (2, 3)
    assert words in output
    assert output.count("error:") == 1, output
    assert "Traceback" not in output
    assert sorted(p.name for p in run_dir.rglob("*")) == before, "nothing was written"


def test_a_run_does_not_go_back_behind_its_own_checkpoints(run_dir, tmp_path):
    """Step 3 was taken for saved already, and the next start went on from the step 4 that had been given up."""
    code, output = resume(run_dir, resume=folder(run_dir, 2))
    assert code == 2
    assert "goes on from step 2 and" in output
    assert f"{run_dir} already holds global_step4; choose another --run_dir" in output
    code, output = resume(tmp_path / "branch", resume=folder(run_dir, 2))
    assert code == 0, output
    assert "step 2 of 6" in output
    code, output = resume(tmp_path / "branch", resume=run_dir)
    assert code == 2
    assert "already holds global_step6" in output


def test_a_damaged_newest_checkpoint_of_a_run_to_resume_is_told(run_dir, tmp_path):
    flip_a_bit(shard(run_dir, 4))
    code, output = resume(tmp_path / "branch", resume=run_dir)
    assert code == 0, output
    assert "skipped checkpoint global_step4: " in output
    assert "step 3 of 6" in output


def test_other_data_under_the_same_name_is_refused(run_dir, tmp_path):
    write_bytes_corpus(tmp_path / "other", [b"another text altogether " * 100])
    code, output = resume(run_dir, data=tmp_path / "other")
    assert code == 2
    assert "is of other data" in output


def test_the_best_checkpoint_survives_and_the_oldest_go(tmp_path):
    run = tmp_path / "run"
    flags = {"keep_last": 2, "max_steps": 6, "eval_interval": 1, "lr": 5.0, "eval_steps": 2}
    code, output = resume(run, ranks=1, **flags, valid_data=f"v={tiny_corpus()}-valid")
    assert code == 0, output
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: r["valid/v/loss"] for r in losses if "valid/v/loss" in r and r["step"] > 0}
    best = min(by_step, key=by_step.get)
    assert best < 5, "a rate of 5 has to ruin the model for this test to show anything"
    assert [manifest.step_of(f) for f in manifest.folders(run / "checkpoints")] == [6, 5, best]
    assert checkpoint.read_state(folder(run, 6)).best_step == best


def test_a_best_step_whose_save_failed_takes_no_other_checkpoint_with_it(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    (root / manifest.tmp_name(1)).write_text("in the way")
    flags = {"keep_last": 2, "max_steps": 6, "eval_interval": 1, "eval_steps": 1, "lr": 5.0}
    code, output = resume(tmp_path / "run", ranks=1, **flags, valid_data=f"v={tiny_corpus()}-valid")
    assert code == 0, output
    assert "WARNING: checkpoint of step 1 failed, going on" in output
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_step = {r["step"]: r["valid/v/loss"] for r in losses if "valid/v/loss" in r and r["step"] > 0}
    assert min(by_step, key=by_step.get) == 1, "the step that could not be saved has to be the best for this test"
    best = min(by_step.keys() - {1}, key=by_step.get)
    assert checkpoint.read_state(folder(tmp_path / "run", 6)).best_step == best
    assert folder(tmp_path / "run", best).exists()


def test_a_second_job_on_the_same_folder_is_refused(run_dir):
    from megagpt.train.folder import _take_lock

    with _take_lock(run_dir):
        code, output = resume(run_dir)
    assert code == 2
    assert f"{run_dir} is in use by process {os.getpid()}" in output


def test_an_unwritable_run_folder_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    code, output = resume(tmp_path / "file" / "run", ranks=1)
    assert code == 7
    assert "cannot write to --run_dir" in output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_named_and_the_older_checkpoints_stay(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        code, output = resume(small / "run", ranks=1, max_steps=9)
        assert code == 7, output
        assert "MB free and a checkpoint takes about" in output or "No space left on device" in output
        intact = [f for f in manifest.folders(small / "run" / "checkpoints") if manifest.problem(f) is None]
        assert intact, "the checkpoints written before the disk was full are whole"
        assert not list((small / "run" / "checkpoints").glob(".tmp*")), "and what was half-written is gone"
    finally:
        subprocess.run(["umount", small], check=True)


def test_tools_that_cannot_be_put_beside_the_checkpoints_are_done_without(tmp_path):
    """DeepSpeed copies them on rank 0, whose error left the other ranks waiting."""
    (tmp_path / "run" / "checkpoints" / "zero_to_fp32.py").mkdir(parents=True)
    code, output = resume(tmp_path / "run", max_steps=1)
    assert code == 0, output
    assert manifest.problem(folder(tmp_path / "run", 1)) is None


def test_a_disk_that_fails_in_the_middle_of_a_file_is_reported_as_such(tmp_path):
    writer = checkpoint.Writer(tmp_path)
    writer.save({"w": torch.zeros(1000)}, tmp_path / "missing_folder" / "a.pt")
    writer.finish()
    with pytest.raises(checkpoint.StorageError, match="No such file or directory"):
        writer.raise_error()


def test_a_run_may_go_on_with_other_blocks_recomputed(run_dir):
    code, output = resume(run_dir, activation_checkpointing=1)
    assert code == 0, output
    assert "step 4 of 6" in output


def test_weights_of_a_blend_count_relative_to_each_other(tmp_path):
    run, prefix = tmp_path / "run", tiny_corpus()
    flags = arguments(run, max_steps=1)
    at = flags.index("--data")
    for data, step in ((["0.7", prefix, "0.3", f"{prefix}-valid"], 0), (["7", prefix, "3", f"{prefix}-valid"], 1)):
        codes, output = train([*flags[: at + 1], *data, *flags[at + 2 :]], 1)
        assert codes == [0], output
        assert f"step {step} of 1" in output
