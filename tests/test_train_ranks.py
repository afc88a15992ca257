"""A run that goes on with another number of ranks: the same samples, the same global batch, nearly the same losses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_common import arguments, curve, stopped_after
from distributed import train
from several_runs import Case, launch

from megagpt.errors import StorageError
from megagpt.train import checkpoint, reshard

STEPS = 8
# Twice what the largest difference between runs of one and of two ranks from the start can be.
LARGEST = {"fp32": 1e-5, "bf16": 2e-2}


def run(run_dir: Path, ranks: int, steps: int, stage: int, precision: str, **changes) -> str:
    flags = {"dropout": 0, "keep_last": 9, "save_interval": 3, "kernels": "torch", "lr": 1e-2, **changes}
    codes, output = train(
        arguments(run_dir, stage=stage, max_steps=steps, precision=precision, schedule="warmup_constant", **flags),
        ranks,
    )
    assert codes == [0] * ranks, output
    return output


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in curve(run_dir)]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
)
def test_two_ranks_then_one_then_two_compute_what_two_ranks_would_have(tmp_path, stage, precision):
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    run(whole, 2, STEPS, stage, precision)
    run(changed, 2, 3, stage, precision)
    output = run(changed, 1, 6, stage, precision)
    assert "ranks: 2 then, 1 now; global_step3 is cut anew" in output
    assert "accumulation 1 then, 2 now; global batch 4 kept" in output
    assert "batch 2 x 2 x 1 = 4 sequences" in output
    output = run(changed, 2, STEPS, stage, precision)
    assert "ranks: 1 then, 2 now; global_step6 is cut anew" in output
    assert "batch 2 x 1 x 2 = 4 sequences" in output
    expected, found = curve(whole), curve(changed)
    for key in ("step", "samples", "tokens", "lr"):
        assert [record[key] for record in found] == [record[key] for record in expected], key
    differences = [abs(a - b) for a, b in zip(losses(changed), losses(whole), strict=True)]
    assert max(differences) <= LARGEST[precision], differences
    assert abs(losses(whole)[-1] - losses(whole)[2]) > 5 * LARGEST[precision], "too little is learnt to tell"
    assert not list((changed / "checkpoints").glob(".*")), "what the conversion wrote is gone"


def test_two_ranks_then_four_compute_what_two_would_have(tmp_path):
    """ZeRO-1, 2 and 3, one after the other in one process group, with parameters that decay and that do not."""

    def case(name, stage):
        flags = {"dropout": 0, "keep_last": 9, "save_interval": 3, "kernels": "torch", "lr": 1e-2, "max_steps": 6}
        flags |= {"schedule": "warmup_constant", "global_batch_size": 8, "weight_decay": 0.1}
        return Case([str(word) for word in arguments(tmp_path / name, stage=stage, **flags)])

    stages = (1, 2, 3)
    launch({f"whole{stage}": case(f"whole{stage}", stage) for stage in stages})
    for stage in stages:
        stopped_after(tmp_path / f"whole{stage}", tmp_path / f"more{stage}", 3)
    outputs = launch({f"more{stage}": case(f"more{stage}", stage) for stage in stages}, 4)
    assert outputs[0].count("ranks: 2 then, 4 now; global_step3 is cut anew") == 3
    for stage in stages:
        whole, more = curve(tmp_path / f"whole{stage}"), curve(tmp_path / f"more{stage}")
        assert len(whole[0]["lr"]) == 2
        assert [r["samples"] for r in more] == [r["samples"] for r in whole]
        differences = [abs(a["loss"] - b["loss"]) for a, b in zip(more, whole, strict=True)]
        assert max(differences) <= LARGEST["fp32"], differences
        assert differences[:3] == [0.0] * 3


def test_zero_1_goes_on_as_zero_2(tmp_path):
    run(tmp_path / "whole", 2, 6, 1, "fp32")
    stopped_after(tmp_path / "whole", tmp_path / "changed", 3)
    output = run(tmp_path / "changed", 2, 6, 2, "fp32")
    assert "ZeRO stage: 1 then, 2 now" in output
    differences = [a - b for a, b in zip(losses(tmp_path / "changed"), losses(tmp_path / "whole"), strict=True)]
    assert max(map(abs, differences)) <= LARGEST["fp32"]


def test_a_global_batch_that_the_new_ranks_cannot_share_is_told_with_those_they_can(tmp_path):
    run(tmp_path / "run", 2, 3, 1, "fp32")
    codes, output = train(arguments(tmp_path / "run", max_steps=6, keep_last=9), 3)
    assert codes == [2] * 3
    assert output.count("error: ") == 1
    assert "train_batch_size 4 is no multiple of 2 per rank x 3 ranks; the nearest settings that fit" in output


def test_a_global_batch_that_is_asked_for_counts(tmp_path):
    run(tmp_path / "run", 2, 3, 1, "fp32")
    output = run(tmp_path / "run", 1, 4, 1, "fp32", global_batch_size=8)
    assert "accumulation 1 then, 4 now; global batch 4 then, 8 now" in output
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["samples"] == 3 * 4 + 8


def test_a_disk_that_does_not_take_the_converted_checkpoint_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()  # where the folder of the checkpoints should be
    with pytest.raises(StorageError, match=r"cannot write .*global_step3.*Not a directory; free some space"):
        reshard._convert(tmp_path / "file" / "global_step3", tmp_path / "file" / ".tmp-universal-global_step3")
    folder = tmp_path / "global_step3"
    folder.mkdir()
    (folder / "shard.pt").write_bytes(bytes(3_000_000))
    checkpoint._check_space_to_cut(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(StorageError, match=r"has 2\.0 MB free, and cutting global_step3 anew .* about 3\.0 MB"):
        checkpoint._check_space_to_cut(folder)
