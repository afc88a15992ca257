"""Throughput of ``megagpt serve`` on this CPU: texts of concurrent clients generated together, beside one at a time.

    python kernels/benchmarks/cpu_serve.py [--rounds 3] [--tokens 32] [--clients 8] [--output FOLDER]

Two real servers of the same model, GPT-2's smallest shape with random weights in float32: one generates up to eight
texts at once, as is the default, the other one (``--batch_size 1``). Each client asks over HTTP, waits for the whole
answer and asks again; a latency is that of one request. Greedy, so both have to give the same texts.
"""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import timing
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from megagpt.model.config import GPTConfig
from megagpt.model.gpt import GPT
from megagpt.ops import load_ops

PROMPT = 32
EACH = 2  # requests of a client, one after the other
SMALL = {"vocab_size": 50257, "seq_len": 1024, "n_layer": 12, "n_head": 12, "d_model": 768}
QUICK = {"vocab_size": 101, "seq_len": 128, "n_layer": 2, "n_head": 2, "d_model": 32}
SERVERS = {"together": "8", "one at a time": "1"}  # texts at once


def main() -> None:
    parser = timing.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each text")
    parser.add_argument("--clients", type=int, default=8, help="clients that ask at the same time")
    args = parser.parse_args()
    rounds, n_new, n_clients = (1, 8, 3) if args.quick else (args.rounds or 3, args.tokens, args.clients)
    shape = GPTConfig(**(QUICK if args.quick else SMALL))
    report = timing.Report("cpu_serve", timing.machine("torch", "starlette", "uvicorn"), args.output)
    with tempfile.TemporaryDirectory(prefix="megagpt-serve-") as folder, contextlib.ExitStack() as stack:
        write_model(Path(folder), shape)
        ports = {name: stack.enter_context(served(Path(folder), batch_size)) for name, batch_size in SERVERS.items()}
        for name, n in (("one client", 1), ("several clients", n_clients)):
            report.add(name, *bench(ports, shape.vocab_size, n, n_new, rounds))


def write_model(folder: Path, shape: GPTConfig) -> None:
    """Random weights, and a tokenizer of as many words as the model has rows, none of which ends a text."""
    torch.manual_seed(0)
    model = GPT(shape, load_ops("auto", head_width=shape.head_width, dtype=torch.float32, device="cpu"))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"config": json.dumps(shape.to_dict())})
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab_size)}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))


@contextlib.contextmanager
def served(folder: Path, batch_size: str) -> Iterator[int]:
    """The port of a server of the model in ``folder``, with all of this process's cores."""
    command = [
        sys.executable,
        "-m",
        "megagpt",
        "serve",
        "--from",
        str(folder),
        "--port",
        "0",
        "--batch_size",
        batch_size,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(timing.cores())}
    environment.pop("MEGAGPT_API_KEY", None)
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            told = []
            for line in process.stderr:
                told.append(line)
                if found := re.search(r" is served at http://127\.0\.0\.1:(\d+);", line):
                    break
            else:
                raise RuntimeError(f"the server has not started: {''.join(told)}")
            yield int(found[1])
        finally:
            process.terminate()


def bench(ports: dict[str, int], vocab_size: int, n_clients: int, n_new: int, rounds: int) -> tuple[dict, str]:
    """Tokens a second and latencies of both servers, in turns."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocab_size, (n_clients, EACH, PROMPT), generator=generator).tolist()
    texts: dict[str, list[str]] = {}
    latencies: dict[str, list[timing.Spread]] = {name: [] for name in ports}

    def run(name: str) -> float:
        begun = time.perf_counter()
        texts[name], seconds = ask_all(ports[name], prompts, n_new)
        latencies[name].append(timing.spread(seconds))
        return time.perf_counter() - begun

    for port in ports.values():
        ask_all(port, prompts[:1], 2)
    seconds = timing.interleave({name: lambda name=name: run(name) for name in ports}, rounds)
    together, alone = texts.values()
    equal = sum(a == b for a, b in zip(together, alone, strict=True)) / len(alone)
    assert equal > 0.8, "the servers give different texts"  # rounding may decide between equally likely tokens
    n_tokens = n_clients * EACH * n_new
    rates = {name: timing.spread(n_tokens / s for s in values) for name, values in seconds.items()}
    waits = {name: [spread.median for spread in spreads] for name, spreads in latencies.items()}
    figures = {
        "tokens_per_s": rates,
        "tokens_ratio": timing.paired(seconds["one at a time"], seconds["together"]),
        "latency_s": {name: timing.spread(values) for name, values in waits.items()},
        "latency_ratio": timing.paired(waits["together"], waits["one at a time"]),
        "equal_texts": equal,
    }
    header = ["", "together", "one at a time", "x"]
    rows = [
        ["tokens/s", *figures["tokens_per_s"].values(), figures["tokens_ratio"]],
        ["median latency of a request, s", *figures["latency_s"].values(), figures["latency_ratio"]],
    ]
    plural = "s" * (n_clients > 1)
    title = f"## {n_clients} client{plural}, {EACH} requests each, {n_new} new tokens behind {PROMPT}"
    return figures, f"{title} ({equal:.0%} of the texts equal)\n\n{timing.table(header, rows)}"


def ask_all(port: int, prompts: list[list[list[int]]], n_new: int) -> tuple[list[str], list[float]]:
    """The answers to each client's prompts, and the seconds of each request."""
    answers: list[list[tuple[str, float]]] = [[] for _ in prompts]

    def client(i: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        with contextlib.closing(connection):
            for prompt in prompts[i]:
                begun = time.perf_counter()
                body = json.dumps({"prompt": prompt, "max_tokens": n_new, "temperature": 0})
                connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
                answer = json.loads(connection.getresponse().read())
                assert answer["usage"]["completion_tokens"] == n_new, answer
                answers[i].append((answer["choices"][0]["text"], time.perf_counter() - begun))

    clients = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    found = [answer for asked in answers for answer in asked]
    assert len(found) == sum(map(len, prompts)), "a request has failed"
    return [text for text, _ in found], [seconds for _, seconds in found]


if __name__ == "__main__":
    main()
