"""Training on this CPU: train.py's own loop beside a plain loop in torch and transformers' GPT2LMHeadModel.

    python kernels/benchmarks/cpu_train.py [--shapes A B] [--precisions fp32 bf16] [--rounds N] [--output FOLDER]

Ours is the loop that train.py runs, with DeepSpeed's engine, data, schedule and log, on one rank. Peers: the plain loop
of tests/reference_gpt.py, and the same with transformers' model, on batches that lie ready. "without DeepSpeed" is our
model in the plain loop. All use torch's fused AdamW and clip gradients; ours and the peers live in a process each, as
they do for a user, and take turns. Nothing is timed before our loss is the plain model's. In bf16 ours keeps 32-bit
master weights, and so does "autocast"; the other peers train in 16 bits alone.
"""

import itertools
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path

import timing
from training import DTYPES, Ours, Peers, Shape

SHAPES = {
    "A": Shape(4, 128, 4, 64, 12, steps=5, rounds=30),
    "B": Shape(6, 384, 6, 256, 8, steps=1, rounds=9),
}
QUICK = Shape(2, 32, 2, 16, 4, steps=1, rounds=1)
PLAIN, PEER = "plain loop", "transformers"
HEADER = ["variant", "dropout", "ms a step", "tokens/s", "x plain loop's time", "x transformers'", "x without dropout"]


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    args = parser.parse_args()
    shapes = {"quick": QUICK} if args.quick else {name: SHAPES[name] for name in args.shapes}
    on = timing.machine("torch", "deepspeed", "transformers")
    report = timing.Report("cpu_train", on, args.output)
    for (name, shape), precision in itertools.product(shapes.items(), args.precisions):
        results, threads = measure(shape, precision, args.rounds or shape.rounds)
        figures, rows = evaluate(results, shape)
        title = f"## {name}: {shape}, {precision}, {threads} threads"
        report.add(f"{name} {precision}", figures, f"{title}\n\n{timing.table(HEADER, rows)}")


def measure(shape: Shape, precision: str, rounds: int) -> tuple[dict[tuple[str, float], list[float]], int]:
    """Seconds a step of each variant in each round, and torch's threads."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as folder:
        workers = [
            Worker(context, serve_ours, shape, precision, Path(folder)),
            Worker(context, serve_peers, shape, precision),
        ]
        variants = {name: partial(worker.time, name) for worker in workers for name in worker.ready()}
        results = timing.interleave(variants, rounds)
        for worker in workers:
            worker.close()
    return results, workers[0].threads


def evaluate(results: dict, shape: Shape) -> tuple[dict, list[list[object]]]:
    """The figures of one shape and precision, and the rows of their table."""
    figures, rows = {}, []
    for (name, p), seconds in results.items():
        found = {
            "ms": timing.spread(1e3 * s for s in seconds),
            "of plain loop": timing.paired(seconds, results[PLAIN, p]),
            "of transformers": timing.paired(seconds, results[PEER, p]),
            "of dropout 0": timing.paired(seconds, results[name, 0.0]),
        }
        figures[f"{name}, dropout {p}"] = found
        tokens = 1e3 * shape.batch * shape.seq_len / found["ms"].median
        ms, *ratios = found.values()
        rows.append([name, p, ms, f"{tokens:.0f}", *ratios[: 3 if p else 2], *[""] * (not p)])
    return figures, rows


# -- the processes


class Worker:
    """A process that holds variants ready and takes steps when it is told to."""

    threads: int

    def __init__(self, context, target, *args) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> list[tuple[str, float]]:
        """Wait for the variants; their names."""
        names, self.threads = self._pipe.recv()
        return names

    def time(self, name: tuple[str, float]) -> float:
        """Seconds a step of one variant."""
        self._pipe.send(name)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def serve_ours(pipe, shape: Shape, precision: str, folder: Path) -> None:
    ours = Ours(shape, precision, folder)
    serve(pipe, ours, shape)
    ours.close()


def serve_peers(pipe, shape: Shape, precision: str) -> None:
    serve(pipe, Peers(shape, precision), shape)


def serve(pipe, variants: Peers, shape: Shape) -> None:
    time_on_request(pipe, variants.steps(), shape.steps, warm_up=min(3, 2 * shape.steps))


def time_on_request(pipe, steps: dict, together: int, *, warm_up: int) -> None:
    """Take steps until there is nothing more asked for; what the first steps set up is not timed."""
    import torch

    for step in steps.values():
        for _ in range(warm_up):
            step()
    pipe.send((list(steps), torch.get_num_threads()))
    while (name := pipe.recv()) is not None:
        pipe.send(timing.timed(lambda: [steps[name]() for _ in range(together)]) / together)


if __name__ == "__main__":
    main()
