"""--on_nan and --spike_factor: what an update that is not finite, or a loss that leaps, leads to; on two ranks."""

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoint_common import arguments, curve, folder, tensors
from several_runs import Case, launch

from megagpt.errors import CheckpointError
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops
from megagpt.train import checkpoint, manifest, postmortem, rewind
from megagpt.train.batches import ranges, without

NAN, LEAP = float("nan"), 50.0
STAGES = {"zero0": (0, "fp32"), "zero1": (1, "bf16"), "zero2": (2, "fp32"), "zero3": (3, "bf16")}


def case(run_dir, *more, samples=(), factor=NAN, **changes):
    """A run of 8 steps of 4 samples that is saved after every third: ``samples`` are poisoned."""
    flags = {"max_steps": 8, "save_interval": 3, "lr": 1e-2, "on_nan": "rewind", **changes}
    return Case([str(word) for word in arguments(run_dir, *more, **flags)], samples, factor)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("rewind")


@pytest.fixture(scope="module")
def told(home) -> str:
    """The output of all runs."""
    fp16 = home / "fp16.json"
    scale = {"enabled": True, "initial_scale_power": 24, "hysteresis": 2}
    batch = {"train_micro_batch_size_per_gpu": 2, "tensorboard": {}}
    fp16.write_text(json.dumps({"fp16": scale, "zero_optimization": {"stage": 2}, **batch}))
    outputs = launch(
        {
            # samples 16 to 19 are those of step 5, and rank 1 has the second half of a batch
            **{
                name: case(home / name, samples=[18], stage=stage, precision=precision)
                for name, (stage, precision) in STAGES.items()
            },
            "twice": case(home / "twice", samples=[18, 22], spike_factor=3),
            "leap": case(home / "leap", samples=[18], factor=LEAP, spike_factor=3),
            "leap unasked": case(home / "leap_unasked", samples=[18], factor=LEAP),
            "too often": case(home / "too_often", samples=range(18, 40), rewind_limit=2),
            "too early": case(home / "too_early", samples=[6]),
            "stop": case(home / "stop", samples=[18], on_nan="stop"),
            "skip": case(home / "skip", samples=[18], on_nan="skip"),
            "fp16": case(home / "fp16", samples=[44], on_nan="stop", ds_config=fp16, max_steps=30, kernels="torch"),
        }
    )
    return "".join(outputs)


def steps_of(told: str, name: str) -> list[tuple[int, int]]:
    """Step and first sample of each micro-batch of rank 0, in their order."""
    lines = [line.split() for line in told.splitlines() if line.startswith(f"{name} step ")]
    found = [(int(words[-4]), int(words[-2].strip("[,"))) for words in lines]
    return [pair for pair in found if pair[1] % 4 == 0]


@pytest.mark.parametrize("name", STAGES)
def test_a_run_goes_back_to_its_last_checkpoint_and_leaves_out_the_samples_of_that_update(told, home, name):
    assert f"{name} is done" in told
    expected = [(step, 4 * step - 4) for step in range(1, 6)] + [(4, 12), (5, 20), (6, 24), (7, 28), (8, 32)]
    assert steps_of(told, name) == expected
    records = curve(home / name)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["skipped_steps"] for r in records if "loss" in r] == [0] * 8
    assert [r["samples"] for r in records if "loss" in r] == [4 * step for step in range(1, 9)]
    made = [{"step": 5, "to_step": 3, "samples": [[16, 20]]}]
    assert json.loads((home / name / "rewinds.json").read_text()) == made
    assert checkpoint.read_state(folder(home / name, 6)).rewinds == made


def test_what_led_to_it_is_written_down(told, home):
    assert "WARNING: step 5: gradients were not finite; went back to global_step3 and leaves out samples 16 to" in told
    found = json.loads((home / "zero1" / "numeric_stop.json").read_text())
    assert found["reason"] == "step 5: gradients were not finite"
    assert found["replay"].startswith("megagpt launch --num_gpus 2 ")
    assert found["replay"].endswith(f"zero1-replay --on_nan stop --resume {folder(home / 'zero1', 3)}")
    last = found["ranks"][1]["last_steps"][-1]
    assert (last["step"], last["skipped"], last["samples"], last["loss"]) == (5, True, [16, 19], "nan")
    assert found["ranks"][0]["last_steps"][-1]["loss"] != "nan"


def test_a_resumed_run_makes_the_same_choice_bit_for_bit(told, home, tmp_path):
    """It goes on from before the poisoned samples, which it would train on, for nothing spoils them any more."""
    cases = {}
    for name, (stage, precision) in STAGES.items():
        shutil.copytree(home / name, tmp_path / name)
        for step in (6, 8):
            shutil.rmtree(folder(tmp_path / name, step))
        cases[name] = case(tmp_path / name, stage=stage, precision=precision)
    output = "".join(launch(cases))
    for name in STAGES:
        assert steps_of(output, name) == [(4, 12), (5, 20), (6, 24), (7, 28), (8, 32)]
        assert curve(tmp_path / name) == curve(home / name)
        ours, theirs = tensors(folder(tmp_path / name, 8)), tensors(folder(home / name, 8))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_it_may_happen_twice_and_not_too_often(told, home):
    assert "twice is done" in told
    assert steps_of(told, "twice")[5:] == [(4, 12), (5, 20), (4, 12), (5, 24), (6, 28), (7, 32), (8, 36)]
    assert [r["samples"] for r in checkpoint.read_state(folder(home / "twice", 8)).rewinds] == [[[16, 20]], [[20, 24]]]
    assert "too often ends with 6: step 5: the run has gone back 2 times (--rewind_limit)" in told
    assert manifest.step_of(manifest.folders(home / "too_often" / "checkpoints")[0]) == 3


def test_without_a_checkpoint_the_update_is_skipped(told, home):
    assert "step 2: gradients were not finite; the update is skipped, for there is no checkpoint yet" in told
    assert [r["skipped_steps"] for r in curve(home / "too_early")] == [0] + [1] * 7
    assert checkpoint.read_state(folder(home / "too_early", 8)).nan_steps == 1
    assert not (home / "too_early" / "rewinds.json").exists()


def test_a_loss_that_leaps_counts_where_that_is_asked_for(told, home):
    assert "step 5: the loss leapt to" in told
    assert steps_of(told, "leap")[5:7] == [(4, 12), (5, 20)]
    assert "leap unasked is done" in told
    assert not (home / "leap_unasked" / "rewinds.json").exists()
    assert checkpoint.read_state(folder(home / "leap", 8)).typical_loss == pytest.approx(
        np.mean([r["loss"] for r in curve(home / "leap")]), rel=0.2
    )


def test_a_run_that_is_to_stop_does_so_at_the_first(told, home):
    assert "stop ends with 6: step 5: gradients were not finite and --on_nan is stop" in told
    assert "skip is done" in told
    records = [json.loads(line) for line in (home / "skip" / "metrics.jsonl").read_text().splitlines()]
    assert [r["nan_steps"] for r in records] == [0] * 4 + [1] * 4


def test_the_search_for_fp16s_scale_is_not_counted_and_a_loss_that_is_not_finite_is(told, home):
    """2^24 overflows first, with a hysteresis of two, so that some of those updates do not lower the scale."""
    assert "fp16 ends with 6: step 12: gradients were not finite and --on_nan is stop" in told
    records = [json.loads(line) for line in (home / "fp16" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["skipped_steps"] > 1
    assert {r["nan_steps"] for r in records} == {0}


def test_samples_left_out_are_not_counted():
    assert without([[4, 8]], np.array([3, 4, 5])).tolist() == [3, 8, 9]
    assert without([[4, 8], [10, 12]], np.arange(3, 8)).tolist() == [3, 8, 9, 12, 13]
    assert without([], np.arange(3)).tolist() == [0, 1, 2]
    assert ranges(np.array([3, 8, 9, 12, 13])) == [[3, 4], [8, 10], [12, 14]]
    assert ranges(np.array([], np.int64)) == []


def test_a_file_of_rewinds_that_is_not_ours_is_refused_and_that_of_another_history_removed(tmp_path):
    (tmp_path / rewind.NAME).write_text('[{"samples": 3}]')
    with pytest.raises(CheckpointError, match=r"rewinds\.json, which says what samples to leave out, cannot be read"):
        rewind.known(tmp_path, checkpoint.TrainState(step=3))
    assert rewind.known(tmp_path, checkpoint.TrainState()) == []
    assert not (tmp_path / rewind.NAME).exists()


def test_the_first_module_whose_output_is_not_finite_is_named():
    config = GPTConfig(vocab_size=64, n_layer=3, n_head=2, d_model=16, seq_len=8)
    model = GPT(config, load_ops("torch", head_width=config.head_width, dtype=torch.float32, device="cpu"))
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    forward = lambda model, ids: model(ids[:, :-1], ids[:, 1:])  # noqa: E731
    state = torch.get_rng_state()
    assert postmortem.first_not_finite(model, forward, [ids]) is None
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.startswith("blocks.1.")).fill_(float("inf"))
    named = postmortem.first_not_finite(model, forward, [ids])
    assert named.startswith("the output of blocks.1.")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_command_to_see_it_again_keeps_the_other_flags(tmp_path):
    argv = ["train.py", "--data", "0.5", "a b", "0.5", "c", "--run-dir=runs/x", "--mirror", "m", "--on_nan", "rewind"]
    found = postmortem.replay_command(tmp_path / "x", tmp_path / "global_step3", 2, argv)
    assert found == (
        f"megagpt launch --num_gpus 2 train.py --data 0.5 'a b' 0.5 c --run_dir {tmp_path}/x-replay --on_nan stop "
        f"--resume {tmp_path}/global_step3"
    )
