"""Named model shapes and the training settings that go with them, as plain dictionaries.

Sources: GPT-1, "Improving Language Understanding by Generative Pre-Training" (2018), section 4.1; GPT-2, "Language
Models are Unsupervised Multitask Learners" (2019), table 2; the sizes named by their parameter count, "Language Models
are Few-Shot Learners" (2020), table 2.1, with head widths that divide the model's width.
"""

from megagpt.errors import ConfigError, nearest

_DROPOUT = {"embd_dropout": 0.1, "attn_dropout": 0.1, "resid_dropout": 0.1}
# Less than one epoch: the 2020 models name weight decay as their only regulariser.
_NO_DROPOUT = dict.fromkeys(_DROPOUT, 0.0)


def _model(norm: str, n_layer: int, d_model: int, n_head: int, seq_len: int, vocab_size: int, dropout: dict) -> dict:
    return {
        "norm": norm,
        "n_layer": n_layer,
        "d_model": d_model,
        "n_head": n_head,
        "d_ff": 4 * d_model,
        "seq_len": seq_len,
        "vocab_size": vocab_size,
        **dropout,
    }


_GPT1_VOCAB, _GPT2_VOCAB = 40_478, 50_257

MODELS = {
    #                    norm    L   d      h   C     vocabulary
    "tiny": _model("pre", 4, 128, 4, 128, 8_192, _DROPOUT),
    # the ablation of the GPT-1 paper: one layer of 2,048 units in the place of the blocks
    "lstm": {**_model("post", 1, 768, 12, 512, _GPT1_VOCAB, _DROPOUT), "d_ff": 2048, "backbone": "lstm"},
    "gpt1": _model("post", 12, 768, 12, 512, _GPT1_VOCAB, _DROPOUT),
    "gpt2-small": _model("pre", 12, 768, 12, 1024, _GPT2_VOCAB, _DROPOUT),
    "gpt2-medium": _model("pre", 24, 1024, 16, 1024, _GPT2_VOCAB, _DROPOUT),
    "gpt2-large": _model("pre", 36, 1280, 20, 1024, _GPT2_VOCAB, _DROPOUT),
    "gpt2-xl": _model("pre", 48, 1600, 25, 1024, _GPT2_VOCAB, _DROPOUT),
    "1.3b": _model("pre", 24, 2048, 16, 2048, _GPT2_VOCAB, _NO_DROPOUT),
    "2.7b": _model("pre", 32, 2560, 32, 2048, _GPT2_VOCAB, _NO_DROPOUT),
    "6.7b": _model("pre", 32, 4096, 32, 2048, _GPT2_VOCAB, _NO_DROPOUT),
    "13b": _model("pre", 40, 5120, 40, 2048, _GPT2_VOCAB, _NO_DROPOUT),
    "175b": _model("pre", 96, 12288, 96, 2048, _GPT2_VOCAB, _NO_DROPOUT),
}


def _training(global_batch_size: int, lr: float, warmup_steps: int, **changes) -> dict:
    return {
        "global_batch_size": global_batch_size,  # sequences
        "lr": lr,
        "min_lr": 0.0,
        "warmup_steps": warmup_steps,
        "schedule": "warmup_cosine",
        "optimizer": "adamw",
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        **changes,
    }


def _few_shot(global_batch_size: int, lr: float) -> dict:
    """2020 settings (appendix B): 300 billion tokens in sequences of 2048, warm-up over 375 million, cosine to a tenth,
    decay 0.1."""
    warmup_steps = round(375e6 / (global_batch_size * 2048))
    changes = {"min_lr": lr / 10, "betas": (0.9, 0.95), "weight_decay": 0.1, "max_tokens": 300_000_000_000}
    return _training(global_batch_size, lr, warmup_steps, **changes)


_GPT2_TRAINING = _training(512, 2.5e-4, 2000)

TRAINING = {
    "tiny": _training(64, 1e-3, 100),
    "gpt1": _training(64, 2.5e-4, 2000, epochs=100.0),
    "lstm": _training(64, 2.5e-4, 2000, epochs=100.0),
    "gpt2-small": _GPT2_TRAINING,
    "gpt2-medium": _GPT2_TRAINING,
    "gpt2-large": _GPT2_TRAINING,
    "gpt2-xl": _GPT2_TRAINING,
    "1.3b": _few_shot(512, 2.0e-4),
    "2.7b": _few_shot(512, 1.6e-4),
    "6.7b": _few_shot(1024, 1.2e-4),
    "13b": _few_shot(1024, 1.0e-4),
    "175b": _few_shot(1600, 0.6e-4),
}


def model_preset(name: str) -> dict:
    """The fields of ``GPTConfig`` for a named shape, a fresh dictionary; raises ConfigError for an unknown name."""
    return dict(MODELS[_known(name)])


def training_preset(name: str) -> dict:
    """The training settings published for a named shape, a fresh dictionary; raises ConfigError for an unknown name."""
    return dict(TRAINING[_known(name)])


def _known(name: str) -> str:
    if name not in MODELS:
        raise ConfigError(f"--model {name} is unknown{nearest(name, MODELS)}; choose one of {', '.join(MODELS)}")
    return name
