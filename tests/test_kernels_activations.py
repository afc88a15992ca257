"""The activations that ``megagpt plan`` counts are those that a forward pass keeps, to the byte."""

from dataclasses import replace

import pytest
import torch

from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops
from megagpt.tools.plan_memory import activations, loss_kept

SHAPE = GPTConfig(vocab_size=61, seq_len=12, n_layer=4, n_head=2, d_model=64, d_ff=160)
B = 2


def kept_bytes(config: GPTConfig, device: str) -> int:
    """Storage that backward will read, each once, of floating point and of dropout's keys, parameters left out."""
    ops = load_ops("triton", head_width=config.head_width, dtype=torch.float32, device=device)
    with torch.device(device):
        model = GPT(config, ops).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype != torch.int64 and tensor.numel() > 1:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(config.vocab_size, (B, config.seq_len), device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, ids)
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("every", [0, 1, 2, 3])
@pytest.mark.parametrize(("norm", "dropout"), [("pre", 0.0), ("pre", 0.1), ("post", 0.1)], ids=str)
def test_activations_are_what_a_forward_pass_keeps(norm, dropout, every, device):
    rates = dict.fromkeys(("embd_dropout", "attn_dropout", "resid_dropout"), dropout)
    config = replace(SHAPE, norm=norm, activation_checkpointing=every, **rates)
    assert kept_bytes(config, device) == activations(config, B, "fp32") + loss_kept(config, B, "fp32")
