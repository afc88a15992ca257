"""A GPT and its training loop in plain torch, as one would write them on an afternoon (after karpathy/nanoGPT).

It shares no code with megagpt: it is the oracle for losses and weights, and the peer in the benchmarks. Only the names
of the parameters are megagpt's, so that weights can be copied with ``load_state_dict``.

    python tests/reference_gpt.py --steps 100     trains on random tokens and prints loss and step time
"""

import argparse
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class ReferenceConfig:
    vocab_size: int = 65
    seq_len: int = 64
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    dropout: float = 0.0
    norm: str = "pre"


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.dropout = c.n_head, c.dropout
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model)
        self.proj = nn.Linear(c.d_model, c.d_model)
        self.resid_dropout = nn.Dropout(c.dropout)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).split(D, dim=2)
        q, k, v = (t.view(B, T, self.n_head, D // self.n_head).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True)
        y = y.transpose(1, 2).contiguous().view(B, T, D)
        return self.resid_dropout(self.proj(y))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Linear(c.d_model, 4 * c.d_model)
        self.proj = nn.Linear(4 * c.d_model, c.d_model)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x):
        return self.dropout(self.proj(F.gelu(self.fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm = c.norm
        self.ln_1 = nn.LayerNorm(c.d_model)
        self.attn = Attention(c)
        self.ln_2 = nn.LayerNorm(c.d_model)
        self.mlp = MLP(c)

    def forward(self, x):
        if self.norm == "post":
            x = self.ln_1(x + self.attn(x))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ReferenceGPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.wte = nn.Embedding(c.vocab_size, c.d_model)
        self.wpe = nn.Embedding(c.seq_len, c.d_model)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.ln_f = nn.LayerNorm(c.d_model) if c.norm == "pre" else nn.Identity()
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith("proj.weight") and c.norm == "pre":
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * c.n_layer))

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, ids, targets=None):
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.dropout(self.wte(ids) + self.wpe(positions))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))


def make_optimizer(model, lr, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8):
    """Fused AdamW; matrices decay, biases and gains don't."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def warmup_cosine(step, warmup, total):
    """Multiplier of the rate for update ``step``, counted from 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def train_step(model, optimizer, ids, targets, lr, *, clip=1.0, accumulation=1):
    """One update over a global batch (B, T) split into ``accumulation`` equal parts; the mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = 0.0
    for part, part_targets in zip(ids.chunk(accumulation), targets.chunk(accumulation), strict=True):
        loss = model(part, part_targets) / accumulation
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def train(model, batches, *, lr, warmup, total, weight_decay=0.01, clip=1.0, accumulation=1):
    """The losses of ``total`` updates over ``batches``, each int64 (B, T + 1)."""
    optimizer = make_optimizer(model, lr, weight_decay)
    losses = []
    for step, batch in zip(range(total), batches, strict=False):
        rate = lr * warmup_cosine(step, warmup, total)
        loss = train_step(model, optimizer, batch[:, :-1], batch[:, 1:], rate, clip=clip, accumulation=accumulation)
        losses.append(float(loss))
    return losses


def main():
    parser = argparse.ArgumentParser()
    for name, value in vars(ReferenceConfig()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = ReferenceConfig(**{name: getattr(args, name) for name in vars(ReferenceConfig())})
    model = ReferenceGPT(config).to(getattr(torch, args.dtype))
    optimizer = make_optimizer(model, args.lr)
    for step in range(args.steps):
        batch = torch.randint(config.vocab_size, (args.batch, config.seq_len + 1))
        begun = time.perf_counter()
        rate = args.lr * warmup_cosine(step, 10, args.steps)
        loss = float(train_step(model, optimizer, batch[:, :-1], batch[:, 1:], rate))
        print(f"step {step} loss {loss:.4f} {1e3 * (time.perf_counter() - begun):.1f} ms")


if __name__ == "__main__":
    main()
