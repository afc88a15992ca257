"""Fine-tuning on this CPU: finetune.py's own loop beside transformers' Trainer with the same GPT-2, texts and batches.

    python kernels/benchmarks/cpu_finetune.py [--shapes A B] [--rounds N] [--output FOLDER]

Both classify the same made-up texts, whose lengths are spread like those of short messages, in batches of 32 with
dropout 0.1 and AdamW with clipped gradients; both read and pad their batches themselves. "with LM" adds the auxiliary
language model, for which the Trainer has no counterpart. Ours and the Trainer live in a process each and take turns.
Nothing is timed before both find the same logits with the same weights.
"""

import multiprocessing
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timing
from cpu_train import Worker
from finetuning import serve_ours, serve_trainer


@dataclass(frozen=True)
class Shape:
    """A decoder, the texts of a batch, and how it is timed: ``steps`` together, in so many ``rounds``."""

    n_layer: int
    d_model: int
    n_head: int
    words: tuple[int, int]  # fewest and most in a text
    batch: int
    steps: int
    rounds: int

    def __str__(self) -> str:
        low, high = self.words
        return f"{self.n_layer} layers x {self.d_model}, {self.n_head} heads, {low} to {high} tokens, B={self.batch}"


SHAPES = {"A": Shape(4, 128, 4, (5, 60), 32, 2, 25), "B": Shape(6, 256, 4, (5, 60), 32, 1, 15)}
QUICK = Shape(2, 32, 2, (3, 12), 4, steps=1, rounds=1)
PEER = "Trainer"
HEADER = ["variant", "ms a step", "examples/s", "x Trainer's speed"]


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    shapes = {"quick": QUICK} if args.quick else {name: SHAPES[name] for name in args.shapes}
    report = timing.Report("cpu_finetune", timing.machine("torch", "deepspeed", "transformers"), args.output)
    for name, shape in shapes.items():
        seconds, threads = measure(shape, args.rounds or shape.rounds)
        figures, rows = evaluate(seconds, shape)
        title = f"## {name}: {shape}, fp32, {threads} threads"
        report.add(name, figures, f"{title}\n\n{timing.table(HEADER, rows)}")


def measure(shape: Shape, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds a step of each variant in each round, and torch's threads."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as folder:
        workers = [Worker(context, serve, shape, Path(folder)) for serve in (serve_ours, serve_trainer)]
        variants = {name: partial(worker.time, name) for worker in workers for name in worker.ready()}
        seconds = timing.interleave(variants, rounds)
        for worker in workers:
            worker.close()
    return seconds, workers[0].threads


def evaluate(results: dict[str, list[float]], shape: Shape) -> tuple[dict, list[list[object]]]:
    """The figures of one shape, and the rows of their table."""
    figures, rows = {}, []
    for name, seconds in results.items():
        ms, speed = timing.spread(1e3 * s for s in seconds), timing.paired(results[PEER], seconds)
        figures[name] = {"ms": ms, "of Trainer's speed": speed}
        rows.append([name, ms, f"{1e3 * shape.batch / ms.median:.0f}", speed])
    return figures, rows


if __name__ == "__main__":
    main()
