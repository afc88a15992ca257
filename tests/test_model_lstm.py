"""The recurrent backbone: the equations of an LSTM, the interface of a GPT, and training at every ZeRO stage."""

import json

import pytest
import torch
from corpora import tiny_corpus
from distributed import train

from megagpt.errors import CheckpointError, ConfigError
from megagpt.evaluate.source import open_source
from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT, decays
from megagpt.model.interop import to_transformers
from megagpt.ops import load_ops

SHAPE = {"vocab_size": 50, "seq_len": 16, "n_layer": 1, "n_head": 2, "d_model": 12, "d_ff": 20, "backbone": "lstm"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTConfig(**SHAPE)
    return GPT(config, load_ops("torch", head_width=config.head_width, dtype=torch.float32, device="cpu")).eval()


def by_hand(model, ids):
    """Hidden states from the equations, one step after another, in float64. Gates in torch's order i, f, g, o."""
    weights = {name: p.double() for name, p in model.named_parameters()}
    rnn = {name: weights[f"blocks.0.rnn.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    h = c = torch.zeros(len(ids), 20, dtype=torch.float64)
    states = []
    for step in ids.T:
        x = weights["wte.weight"][step]
        gates = x @ rnn["weight_ih"].T + rnn["bias_ih"] + h @ rnn["weight_hh"].T + rnn["bias_hh"]
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return torch.stack(states, 1) @ weights["blocks.0.proj.weight"].T + weights["blocks.0.proj.bias"]


def test_the_hidden_states_follow_from_the_equations(model):
    with torch.no_grad():
        for p in model.parameters():  # values at which every gate matters
            p.normal_(std=0.5)
    ids = torch.randint(50, (3, 16))
    torch.testing.assert_close(model.hidden(ids).double(), by_hand(model, ids), rtol=1e-5, atol=1e-5)


def test_order_counts_without_a_position_table(model):
    assert "wpe.weight" not in model.state_dict()
    forward, backward = model.hidden(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert not torch.equal(forward, backward)


def test_a_token_changes_nothing_before_it(model):
    ids = torch.randint(50, (1, 16))
    changed = ids.clone()
    changed[0, 9] = (ids[0, 9] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_dropout_is_on_in_training_alone(model):
    ids = torch.randint(50, (1, 16))
    assert torch.equal(model.hidden(ids), model.hidden(ids))
    model.train()
    assert not torch.equal(model.hidden(ids), model.hidden(ids))


def test_matrices_begin_with_gpt_s_spread_and_decay_and_biases_are_zero(model):
    for name, p in model.named_parameters():
        assert decays(name) == (p.dim() == 2), name
        assert (p == 0).all() if p.dim() == 1 else 0.015 < p.std() < 0.025, name


def test_its_shape_is_plain_data_and_a_transformer_s_is_as_it_was():
    config = GPTConfig(**SHAPE)
    assert GPTConfig.from_dict(config.to_dict()) == config
    assert "backbone" not in GPTConfig(**{**SHAPE, "backbone": "transformer"}).to_dict()
    with pytest.raises(ConfigError, match="choose transformer or lstm"):
        GPTConfig(**{**SHAPE, "backbone": "rnn"})


def test_it_has_no_form_as_a_transformer_of_others(model):
    with pytest.raises(CheckpointError, match="lstm"):
        to_transformers(model.state_dict(), model.config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The losses of two ranks at stages 0 and 3, and the run folder of stage 3."""
    found = {}
    for stage in (0, 3):
        folder = tmp_path_factory.mktemp(f"stage{stage}")
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        (folder / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}))
        shape = ["--model", "lstm", "--d_model", 24, "--d_ff", 40, "--n_head", 2, "--seq_len", 16, "--vocab_size", 320]
        options = ["--max_steps", 4, "--warmup_steps", 1, "--lr", 3e-3, "--log_interval", 1]
        where = ["--ds_config", folder / "ds.json", "--data", tiny_corpus(), "--run_dir", folder / "run"]
        codes, output = train([*where, *shape, *options], 2)
        assert codes == [0, 0], output
        records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        found[stage] = [record["loss"] for record in records if "loss" in record], folder / "run"
    return found


def test_it_trains_split_over_ranks_as_it_does_whole(runs):
    whole, split = runs[0][0], runs[3][0]
    assert len(whole) == 4
    assert whole[-1] < whole[0]
    assert split == pytest.approx(whole, rel=1e-4)


def test_a_checkpoint_is_read_back(runs):
    model = open_source(runs[3][1]).build("cpu")
    assert model.config.backbone == "lstm"
    assert model.next_logits(torch.tensor([[1, 2, 3]])).isfinite().all()
