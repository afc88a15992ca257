"""``megagpt warm`` goes through what a run will launch."""

from corpora import tiny_corpus
from distributed import run_ranks

ROOT_FLAGS = ["--ds_config", "ds_configs/cpu.json", "--model", "tiny", "--n_layer", "3", "--seq_len", "32"]


def _warm(argv):
    import os
    from pathlib import Path

    from megagpt.train.warm import warm_main

    os.chdir(Path(__file__).parent.parent)
    return warm_main(argv)


def test_one_block_at_the_shapes_of_the_run_goes_forward_and_backward(tmp_path):
    flags = [*ROOT_FLAGS, "--data", tiny_corpus(), "--run_dir", str(tmp_path / "run"), "--max_steps", "2"]
    ((code, output),) = run_ranks(_warm, 1, flags, env={"MEGAGPT_WARM_RANKS": "4", "SLURMD_NODENAME": "n7"})
    assert code == 0, output
    assert "n7: kernels cpu, attention cpu, Adam: torch's own is used on CPUs" in output
    assert not (tmp_path / "run").exists()
