"""Under ZeRO-3 a model is built, run and recomputed as if one rank held it, which none ever does."""

import hashlib
import json

import pytest
import torch
from corpora import tiny_corpus
from distributed import run_ranks, train

from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

D = 64


def build(norm):
    config = GPTConfig(vocab_size=300, seq_len=64, n_layer=3, n_head=4, d_model=D, norm=norm)
    torch.manual_seed(0)
    return GPT(config, load_ops("torch", head_width=config.head_width, dtype=torch.float32, device="cpu"))


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def build_sharded(norm):
    """Digests of the gathered values, (elements, elements held here) of each, and the most elements ever held whole."""
    import os

    from megagpt import dist
    from megagpt.config import deepspeed as ds
    from megagpt.config.fields import TrainSettings
    from megagpt.train import engine

    world = dist.resolve_world(os.environ)
    raw = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    settings = TrainSettings(ds_config="zero3.json", data=("none",), run_dir="none")
    config = ds.resolve(raw, settings, world.world_size, path="zero3.json", hidden_size=D)
    engine.start_distributed(timeout_minutes=1)
    registered, most = [], [0]

    def count(module, name, parameter):
        registered.append(parameter)
        most[0] = max(most[0], sum(p.numel() for p in registered))

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    with engine.sharded_construction(config):
        model = build(norm)
    handle.remove()
    held = {name: (p.ds_numel, p.ds_tensor.numel()) for name, p in model.named_parameters()}
    with engine.full_parameters(list(model.parameters()), config):
        digests = {name: digest(p) for name, p in model.named_parameters()}
    engine.stop_distributed()
    return digests, held, most[0]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_split_over_ranks_the_values_are_the_same_and_no_rank_ever_holds_the_whole(norm):
    whole = build(norm)
    expected = {name: digest(p) for name, p in whole.named_parameters()}
    largest_module = max(p.numel() + D * 4 for p in whole.parameters())
    for (digests, held, most), _ in run_ranks(build_sharded, 2, norm):
        assert digests == expected
        assert all(local == -(-n // 2) for n, local in held.values()), held
        assert 0 < most <= largest_module


def losses(folder, stage, *flags):
    folder.mkdir()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    (folder / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}))
    shape = ["--model", "tiny", "--n_layer", 3, "--d_model", 48, "--n_head", 3, "--seq_len", 32]
    options = ["--max_steps", 4, "--warmup_steps", 1, "--lr", 3e-3, "--log_interval", 1]
    where = ["--ds_config", folder / "ds.json", "--data", tiny_corpus(), "--run_dir", folder / "run"]
    codes, output = train([*where, *shape, *options, *flags], 2)
    assert codes == [0, 0], output
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def test_recomputed_blocks_and_dropped_tables_read_parameters_where_they_are_whole(tmp_path):
    """With dropout on, the losses are those of whole models that recompute nothing, to the last bit."""
    mode = ["--embd_dropout_mode", "matrix"]
    whole = losses(tmp_path / "whole", 0, *mode)
    assert losses(tmp_path / "split", 3, *mode, "--activation_checkpointing", 2) == whole
    assert len(set(whole)) == 4
