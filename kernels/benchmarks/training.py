"""One step of training in every form that cpu_train.py times: train.py's own loop, and its peers."""

import contextlib
import io
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tests"))
from reference_gpt import ReferenceConfig, ReferenceGPT, make_optimizer, train_step  # noqa: E402

VOCAB, LR, DROPOUT = 65, 1e-3, 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """A decoder, the sequences in a step, and how it is timed: ``steps`` together, in so many ``rounds``."""

    n_layer: int
    d_model: int
    n_head: int
    seq_len: int
    batch: int
    steps: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.n_layer} layers x {self.d_model}, {self.n_head} heads, T={self.seq_len}, B={self.batch}"

    def tokens(self) -> np.ndarray:
        """Random tokens, int64 (64, B, T + 1)."""
        return np.random.default_rng(0).integers(0, VOCAB, (64, self.batch, self.seq_len + 1))


class Peers:
    """The plain loop, with its own model and with transformers'."""

    def __init__(self, shape: Shape, precision: str) -> None:
        self.shape, self.precision, self.dtype = shape, precision, DTYPES[precision]
        self.batches = torch.from_numpy(shape.tokens())

    def steps(self) -> dict[tuple[str, float], Step]:
        """{(name, dropout rate): a function that takes one step}."""
        found: dict[tuple[str, float], Step] = {}
        for p in (0.0, DROPOUT):
            found["plain loop", p] = self.plain(self.reference(p, self.dtype))
            if self.precision != "fp32":
                found["plain loop, autocast", p] = self.plain(self.reference(p, torch.float32), autocast=True)
            found["transformers", p] = self.plain(self.transformers(p))
        return found

    def plain(self, model: torch.nn.Module, *, autocast: bool = False) -> Step:
        """A step of the plain loop with ``model``."""
        optimizer, batches = make_optimizer(model, LR), itertools.cycle(self.batches)

        def step() -> None:
            tokens = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                train_step(model, optimizer, tokens[:, :-1], tokens[:, 1:], LR)

        return step

    def reference(self, p: float, dtype: torch.dtype) -> ReferenceGPT:
        s = self.shape
        return ReferenceGPT(ReferenceConfig(VOCAB, s.seq_len, s.n_layer, s.n_head, s.d_model, p)).to(dtype)

    def transformers(self, p: float) -> torch.nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel, logging

        logging.set_verbosity_error()
        s = self.shape
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=s.seq_len,
            n_embd=s.d_model,
            n_layer=s.n_layer,
            n_head=s.n_head,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), p),
            **dict.fromkeys(("bos_token_id", "eos_token_id"), 0),
            attn_implementation="sdpa",
        )
        return _Labelled(GPT2LMHeadModel(config).to(self.dtype))


class _Labelled(torch.nn.Module):
    """transformers' model behind the plain model's signature; it shifts the labels itself."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.train()

    def forward(self, ids, targets):
        return self.model(ids, labels=ids, use_cache=False).loss


class Ours(Peers):
    """train.py's loop under ZeRO-0 and ZeRO-1, and our model in the plain loop. Close it in the end."""

    def __init__(self, shape: Shape, precision: str, folder: Path) -> None:
        from megagpt import dist
        from megagpt.train import engine

        super().__init__(shape, precision)
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self.world = dist.resolve_world({})
        self.device = engine.device_of(self.world)
        dist.export(self.world)
        engine.start_distributed(10)
        self.stack.callback(engine.stop_distributed)
        write_corpus(folder / "corpus", shape.tokens().reshape(-1))

    def close(self) -> None:
        self.stack.close()

    def steps(self) -> dict[tuple[str, float], Step]:
        found: dict[tuple[str, float], Step] = {}
        for p in (0.0, DROPOUT):
            for stage in (0, 1):
                loop = self.loop(stage, p)
                if p == 0:
                    self.check(loop.engine.module)
                found[f"megagpt, ZeRO-{stage}", p] = _quiet(loop.advance)
            found["megagpt without DeepSpeed", p] = self.plain(self.model(p))
        return found

    def loop(self, stage: int, p: float):
        """The loop of ``train.py --ds_config ds_configs/cpu.json`` with another ZeRO stage."""
        from megagpt.config import deepspeed
        from megagpt.config.fields import TrainSettings
        from megagpt.train import plan, run

        sizes = {name: getattr(self.shape, name) for name in ("n_layer", "d_model", "n_head", "seq_len")}
        run_dir = self.folder / f"zero{stage}-dropout{p}"
        run_dir.mkdir()
        settings = TrainSettings(
            ds_config=str(REPO / "ds_configs" / "cpu.json"),
            data=(str(self.folder / "corpus"),),
            run_dir=str(run_dir),
            model="tiny",
            **sizes,
            vocab_size=VOCAB,
            dropout=p,
            micro_batch_size=self.shape.batch,
            precision=self.precision,
            max_steps=10**6,
            lr=LR,
        )
        raw = deepspeed.load(settings.ds_config)
        raw["zero_optimization"]["stage"] = stage
        opened = run.opened(plan.make_plan(settings, raw, self.world), self.world, self.device)
        return _quiet(lambda: self.stack.enter_context(opened))()

    def model(self, p: float) -> torch.nn.Module:
        from megagpt.model.config import GPTConfig
        from megagpt.model.gpt import GPT
        from megagpt.ops import load_ops

        s = self.shape
        config = GPTConfig(VOCAB, s.seq_len, s.n_layer, s.n_head, s.d_model, None, "pre", p, p, p)
        ops = load_ops("auto", head_width=config.head_width, dtype=self.dtype, device="cpu")
        return GPT(config, ops).to(self.dtype)

    def check(self, ours: torch.nn.Module) -> None:
        """Raise AssertionError where the plain model finds another loss than ``ours`` with the same weights."""
        plain = self.reference(0.0, self.dtype)
        plain.load_state_dict(ours.state_dict())
        tokens = self.batches[0]
        with torch.no_grad():
            found, expected = (model(tokens[:, :-1], tokens[:, 1:]).item() for model in (ours, plain))
        tolerance = 1e-4 if self.precision == "fp32" else 2e-2
        assert abs(found - expected) < tolerance, f"ours gives the loss {found} and the plain model {expected}"


def _quiet(work: Callable) -> Callable:
    """``work`` without what it prints."""
    console = io.StringIO()

    def quietly():
        with contextlib.redirect_stdout(console):
            return work()

    return quietly


def write_corpus(prefix: Path, ids: np.ndarray, vocab_size: int = VOCAB) -> None:
    """A corpus of one document."""
    from megagpt.data.writer import CorpusWriter, Counts

    work = Path(f"{prefix}.work")
    work.mkdir()
    writer = CorpusWriter(work, "part", vocab_size)
    writer.append(ids, np.array([len(ids)]), 0, Counts(1, len(ids), len(ids), len(ids), int(ids.max())))
    writer.finish(str(prefix), b"{}", "0" * 64, None, {})
    writer.close()
