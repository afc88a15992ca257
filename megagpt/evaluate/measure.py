"""``megagpt evaluate``: how well a model predicts texts, and how it does on tasks of the evaluation harness."""

import contextlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from megagpt import dist
from megagpt.config.flags import parse_flags
from megagpt.data.indexed import IndexedDataset, plain_prefix
from megagpt.data.storage import check_writable, write_atomically
from megagpt.data.windows import EvalWindows
from megagpt.errors import ConfigError, DataError, NumericError
from megagpt.evaluate.progress import Progress
from megagpt.evaluate.source import Source, open_source

ALIASES = {"run": "from"}
_COLUMNS = {"ppl": "perplexity", "word_ppl": "a word", "bits_per_byte": "bits a byte", "loss": "nats a token"}


@dataclass(frozen=True)
class EvaluateSettings:
    """Measure a trained model: megagpt evaluate --from runs/gpt1 --data data/books-valid"""

    from_: str  # run folder, checkpoint folder, .safetensors file or folder in Hugging Face's form
    data: tuple[str, ...] = ()  # prefixes of prepared corpora, or files of text; NAME=PATH gives a set a name
    stride: int | None = None  # tokens from a window to the next; less than the context gives each token more of it
    max_windows: int | None = None  # windows of each set, evenly spread over it; all by default
    batch_size: int = 8  # sequences at once on each rank

    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness: names, or files of a task's settings
    num_fewshot: int | None = None  # examples before each question of the tasks; what a task says by default
    limit: int | None = None  # questions of each task; all by default

    json: str | None = None  # a file for all figures
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic
    tokenizer: str | None = None  # a tokenizer.json; the run folder's by default

    def __post_init__(self) -> None:
        for name, least in (("stride", 1), ("max_windows", 1), ("batch_size", 1), ("num_fewshot", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} {value} must be at least {least}")
        if not self.data and not self.tasks:
            raise ConfigError("megagpt evaluate needs --data or --tasks; megagpt evaluate --help lists the flags")
        self.sets()

    def sets(self) -> dict[str, str]:
        """{name: path}; without a name a set is called what its path ends in. Raises ConfigError."""
        found: dict[str, str] = {}
        for word in self.data:
            name, equals, path = word.partition("=")
            if not equals:
                name, path = Path(plain_prefix(word)).name, word
            if not name or not path:
                raise ConfigError(f"--data {word!r} is neither a path nor NAME=PATH, as in books=data/books-valid")
            if name in found:
                raise ConfigError(f"--data has two sets {name!r}; give each its own name, NAME=PATH")
            found[name] = path
        return found


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Run ``megagpt evaluate``, on every rank where a launcher started several."""
    settings = parse_flags(EvaluateSettings, argv, prog="megagpt evaluate", aliases=ALIASES)
    if settings.json:
        check_writable(Path(settings.json))
    source = open_source(settings.from_, tokenizer=settings.tokenizer)
    source.tokenizer  # noqa: B018 another one is told before anything is computed
    if settings.stride is not None and settings.stride > source.config.seq_len:
        raise ConfigError(f"--stride {settings.stride} leaves out tokens: the context is {source.config.seq_len}")
    if settings.tasks:
        from megagpt.evaluate.harness import check_installed

        check_installed()
    with ranks() as (world, device), contextlib.ExitStack() as stack:
        opened = {name: stack.enter_context(opened_set(path, source)) for name, path in settings.sets().items()}
        source = source.settled()
        say_checkpoint(settings.from_, source)
        model = dist.everywhere(lambda: source.build(device, settings.dtype))
        figures: dict = {"from": settings.from_, "checkpoint": source.checkpoint, "step": source.step}
        figures["dtype"] = settings.dtype
        if opened:
            figures["data"] = _perplexities(model, opened, settings, world)
        if settings.tasks:
            from megagpt.evaluate.harness import evaluate_tasks

            figures["tasks"] = evaluate_tasks(model, source.tokenizer, settings, world)
        if dist.is_main() and settings.json:
            write_figures(Path(settings.json), figures)
    return 0


def _perplexities(model, opened: dict[str, IndexedDataset], settings: EvaluateSettings, world: dist.World) -> dict:
    """{set: measures}, printed as a table."""
    from megagpt.evaluate.perplexity import evaluate

    device = model.wte.weight.device
    found = {}
    for name, dataset in opened.items():
        windows = EvalWindows(dataset, model.config.seq_len, settings.stride)
        n_windows = min(windows.n_windows, settings.max_windows or windows.n_windows)
        found[name] = evaluate(
            model,
            windows,
            batch_size=settings.batch_size,
            rank=world.rank,
            world_size=world.world_size,
            max_windows=settings.max_windows,
            device=device,
            progress=Progress(name, n_windows, "windows"),
        )
        if not math.isfinite(found[name]["loss"]):
            raise NumericError(f"the loss over {name} is not finite; the model's numbers are broken")
        found[name] |= {"tokens": dataset.n_tokens, "windows": n_windows, "stride": windows.stride}
    if dist.is_main():
        names = [name for name in _COLUMNS if any(name in measures for measures in found.values())]
        rows = [[s, *(f"{m[n]:,.4f}" if n in m else "" for n in names), f"{m['tokens']:,}"] for s, m in found.items()]
        print(table(["set", *(_COLUMNS[name] for name in names), "tokens"], rows), flush=True)
    return found


@contextlib.contextmanager
def opened_set(path: str, source: Source) -> Iterator[IndexedDataset]:
    """The corpus of a prefix, or of a file or folder of text, which is prepared for as long as it is open.

    Raises DataError for a corpus of another tokenizer.
    """
    if Path(plain_prefix(path) + ".idx").exists():
        dataset = IndexedDataset(path)
        theirs, ours = dataset.info and dataset.info.tokenizer_sha256, source.tokenizer.sha256
        if theirs and theirs != ours:
            raise DataError(
                f"{path} was made with another tokenizer than the model's (SHA-256 {theirs[:12]}... and "
                f"{ours[:12]}...); prepare it with that one, or give the text itself"
            )
        dataset.refuse_ids_from(source.config.vocab_size)
        yield dataset
        return
    if not Path(path).exists():
        raise DataError(f"{path} does not exist; give the prefix of a prepared corpus, or a file of text")
    with tempfile.TemporaryDirectory(prefix="megagpt-evaluate-") as folder:
        yield prepared(path, source, Path(folder))


def prepared(path: str, source: Source, folder: Path) -> IndexedDataset:
    """The corpus that ``megagpt prepare`` makes of ``path`` with the model's tokenizer, in ``folder``.

    Raises DataError for what is no plain text or needs a flag to be read.
    """
    from megagpt.data.prepare import PrepareSettings, prepare

    source.tokenizer.save(folder / "tokenizer.json")
    output = str(folder / "text")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            prepare(PrepareSettings(output=output, input=(path,), tokenizer=str(folder / "tokenizer.json"), workers=1))
    except (ConfigError, DataError) as error:
        raise DataError(
            f"{path} cannot be measured as it is: {str(error).removeprefix('--input ')}; where that takes a flag, give "
            "it to megagpt prepare, with the model's tokenizer, and measure the prefix that this makes"
        ) from None
    return IndexedDataset(output)


@contextlib.contextmanager
def ranks() -> "Iterator[tuple[dist.World, object]]":
    """This rank's place and device, with a process group around where there are several ranks."""
    import torch
    from torch import distributed

    from megagpt.dist.devices import own_gpu
    from megagpt.dist.rendezvous import meet

    world = dist.resolve_world(os.environ)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", own_gpu(world))
    if world.world_size == 1:
        yield world, device
        return
    dist.export(world)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // world.local_world_size))
    where = {}
    if (store := meet(world, "evaluate", 120.0)) is not None:
        where = {"store": store, "rank": world.rank, "world_size": world.world_size}
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(minutes=30), **where)
    yield world, device
    # Only after success: a rank that failed alone must end, and not wait here for peers that wait for it.
    distributed.barrier()
    distributed.destroy_process_group()


def say_checkpoint(name: str, source: Source) -> None:
    """Which of a run's checkpoints is taken, where that is to be told."""
    if source.checkpoint is not None and dist.is_main():
        print(f"{name}: {source.checkpoint}", flush=True)


def write_figures(path: Path, figures: dict) -> None:
    """``figures`` as JSON, which has no infinity: what is too large for a number is null. Raises StorageError."""
    write_atomically(path, (json.dumps(_finite(figures), indent=2, allow_nan=False) + "\n").encode())


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as what is in them, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in [header, *rows]
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
