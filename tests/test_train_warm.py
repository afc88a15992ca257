"""``megagpt warm`` and ``megagpt finetune warm`` go through what a run will launch."""

import finetune_common
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
    assert "n7: kernels cpu, attention cpu, Adam: on CPUs torch's own is used" in output
    assert not (tmp_path / "run").exists()


def _warm_fine_tuning(argv):
    from megagpt.finetune.commands import finetune_main
    from megagpt.finetune.model import Classifier

    objectives, forward = [], Classifier.forward

    def noted(self, **batch):
        objectives.append((self.objective, self.lm_coef))
        loss = forward(self, **batch)
        assert loss.requires_grad
        return loss

    Classifier.forward = noted
    code = finetune_main(["warm", *argv])
    return code, objectives


def test_every_kind_of_phase_goes_forward_and_backward(tmp_path):
    files = ["--train", finetune_common.write_csv(tmp_path / "my.csv", 48), "--valid", tmp_path / "my.csv"]
    flags = ["--ds_config", finetune_common.ds_config(tmp_path, 1), "--init_from", finetune_common.pretrained()]
    argv = [str(word) for word in [*flags, *files, "--run_dir", tmp_path / "run", "--recipe", "ulmfit"]]
    env = {"MEGAGPT_WARM_RANKS": "2", "SLURMD_NODENAME": "n7"}
    (((code, objectives), output),) = run_ranks(_warm_fine_tuning, 1, argv, env=env)
    assert code == 0, output
    assert objectives == [("lm", 0.0), ("task", 0.0)]
    assert "n7: kernels cpu, attention cpu, Adam: on CPUs torch's own is used" in output
    assert not (tmp_path / "run").exists()
