"""Speed of the data side on this machine: preparing a corpus, opening and sampling one, checked for equal results.

    python kernels/benchmarks/cpu_data.py [--rounds 5] [--json FILE]

Preparing is measured against what is usual elsewhere: a pool of processes that encodes one document at a time with
the `tokenizers` library. Both read the same JSON lines and write the same ids, which is checked; rounds are
interleaved and each gives a ratio, so load from outside falls on both. With MEGAGPT_DATA the text is books under
GPT-2's vocabulary, otherwise Python's standard library under one trained here.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the peer's users set it: there is a process for each core

import numpy as np

from megagpt.data.bpe import parse_training, train
from megagpt.data.indexed import HEADER, MAGIC, IndexedDataset
from megagpt.data.main import prepare_main
from megagpt.data.permutation import permute
from megagpt.data.stdlib_corpus import files
from megagpt.data.tokenizer import Tokenizer, from_file
from megagpt.data.windows import SAMPLERS, Blend, Windows
from megagpt.data.workers import available_cores

MEGABYTES = 12  # of text for preparing
SEQ_LEN, BATCH = 1024, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    packages = ("tokenizers", "tiktoken", "numpy")
    machine = {"cpu": platform.processor() or platform.machine(), "cores": available_cores()}
    machine |= {name: version(name) for name in packages}
    print(" ".join(f"{name} {value}" for name, value in machine.items()))
    figures = {"machine": machine}
    with tempfile.TemporaryDirectory() as folder:
        figures["prepare"] = bench_prepare(Path(folder), args.rounds)
        figures["reads"] = bench_reads(Path(folder) / "ours-1", args.rounds)
        figures["huge"] = bench_huge(Path(folder))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


# -- preparing


def bench_prepare(folder: Path, rounds: int) -> dict:
    """Seconds and MB/s of ``megagpt prepare`` and of the pool, on one process and on all cores."""
    texts, tokenizer = corpus()
    tokenizer.save(folder / "tokenizer.json")
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    figures = {}
    for n in sorted({1, available_cores()}):
        times: dict[str, list[float]] = {"pool": [], "prepare": []}
        for _ in range(rounds):
            times["pool"].append(timed(functools.partial(pool, source, folder, tokenizer, n)))
            times["prepare"].append(timed(functools.partial(ours, source, folder, n)))
        ids = (folder / "pool.bin").read_bytes()
        assert ids == (folder / f"ours-{n}.bin").read_bytes(), "the two differ in their ids"
        ratios = [a / b for a, b in zip(times["pool"], times["prepare"], strict=True)]
        rate = {name: megabytes / statistics.median(values) for name, values in times.items()}
        print(
            f"prepare, {n} process{'es'[: 2 * (n > 1)]}, {megabytes:.0f} MB: {rate['prepare']:.1f} MB/s, "
            f"{rate['prepare'] / n:.1f} a core; per-document pool {rate['pool']:.1f} MB/s; "
            f"{statistics.median(ratios):.2f} times it ({min(ratios):.2f} to {max(ratios):.2f}), ids equal"
        )
        figures[n] = {"mb_per_s": rate, "ratio": statistics.median(ratios), "ratios": ratios}
    return figures


def corpus() -> tuple[list[str], Tokenizer]:
    """Documents of MEGABYTES in all, and a byte-level tokenizer."""
    texts: list[str] = []
    if "MEGAGPT_DATA" in os.environ:
        data = Path(os.environ["MEGAGPT_DATA"])
        tokenizer = from_file(data / "gpt2_bpe" / "gpt2.json")
        for path in sorted((data / "books").glob("books-train-*.jsonl.xz")):
            with lzma.open(path) as lines:
                texts += [json.loads(line)["text"] for line in lines]
            if sum(map(len, texts)) > MEGABYTES * 10**6:
                return texts, tokenizer
        return texts, tokenizer
    texts = [Path(path).read_text(errors="replace") for path in files()]
    tokenizer = train(texts, parse_training("train:16384"))
    return [text for text in texts if text.strip()] * 2, tokenizer


def ours(source: Path, folder: Path, n: int) -> None:
    """``megagpt prepare`` as a user runs it, start-up and all."""
    args = ["--input", str(source), "--tokenizer", str(folder / "tokenizer.json"), "--workers", str(n)]
    for old in folder.glob(f"ours-{n}.*"):
        old.unlink()
    with contextlib.redirect_stdout(io.StringIO()):
        assert prepare_main([*args, "--output", str(folder / f"ours-{n}")]) == 0


def pool(source: Path, folder: Path, tokenizer: Tokenizer, n: int) -> None:
    """A pool that encodes document by document, written as Megatron-LM's tools/preprocess_data.py does it."""
    with (
        open(source) as lines,
        open(folder / "pool.bin", "wb") as out,
        multiprocessing.get_context("fork").Pool(n, start_encoder, (tokenizer.json,)) as workers,
    ):
        for ids in workers.imap(encode_line, lines, 32):
            out.write(np.array(ids, np.uint16).tobytes())


def start_encoder(tokenizer_json: bytes) -> None:
    global library, end
    tokenizer = Tokenizer(tokenizer_json, "tokenizer")
    library, end = tokenizer.exact, tokenizer.eot_id


def encode_line(line: str) -> list[int]:
    return [*library.encode(json.loads(line)["text"]).ids, end]


# -- reading


def bench_reads(prefix: Path, rounds: int) -> dict:
    """Tokens a second of batches from a file in memory, and the cost of a permuted index."""
    dataset = IndexedDataset(prefix)
    parts = {sampler: Windows(dataset, SEQ_LEN, sampler=sampler, seed=1) for sampler in SAMPLERS}
    parts["blend of two"] = Blend([(0.7, parts["random"]), (0.3, parts["epoch"])])
    figures = {}
    for name, windows in parts.items():
        batches = [np.arange(k * BATCH, (k + 1) * BATCH) for k in range(400)]
        fetch_all(windows, batches)  # pages are mapped
        seconds = statistics.median(timed(functools.partial(fetch_all, windows, batches)) for _ in range(rounds))
        figures[name] = len(batches) * BATCH * SEQ_LEN / seconds
        print(f"hot reads, {name}, {BATCH} x {SEQ_LEN}: {figures[name] / 1e6:.0f} Mtokens/s (goal 500)")
    indices = np.arange(4096)
    seconds = statistics.median(timed(functools.partial(permute, indices, 488_000_000, 1)) for _ in range(20))
    figures["permuted index, ns"] = 1e9 * seconds / len(indices)
    print(f"permuted index of 488 million: {figures['permuted index, ns']:.0f} ns, no memory, no start-up")
    return figures


def fetch_all(windows, batches: list[np.ndarray]) -> None:
    for indices in batches:
        windows.batch(indices)


# -- opening

HUGE_TOKENS, HUGE_DOCUMENTS = 10**12, 10**9
SAMPLE_HUGE = "--sample_huge"  # how the script starts itself, so that memory is measured in a fresh process


def bench_huge(folder: Path) -> dict | None:
    """Seconds and memory to open a corpus of a million million tokens and take the first batch of it."""
    prefix = folder / "huge"
    try:
        write_huge(prefix)
    except OSError as error:
        print(f"opening 10**12 tokens: not measured, this file system has no sparse files of that size ({error})")
        return None
    orders = {}
    for world_size in (1, 2, 8):
        command = [sys.executable, __file__, SAMPLE_HUGE, str(prefix), str(world_size)]
        out = subprocess.run(command, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        seconds, megabytes, order = out.stdout.split()
        orders[world_size] = order
    assert len(set(orders.values())) == 1, "the order depends on the number of ranks"
    print(
        f"opening and sampling 10**12 tokens in 10**9 documents: {float(seconds):.3f} s, {float(megabytes):.1f} MB "
        "(goals 0.5 s, 64 MB); the same order on 1, 2 and 8 ranks"
    )
    return {"seconds": float(seconds), "megabytes": float(megabytes)}


def write_huge(prefix: Path) -> None:
    """Sparse files of the size and with the first and last entries of a real corpus."""
    length = HUGE_TOKENS // HUGE_DOCUMENTS
    pointers = HEADER.size + 4 * HUGE_DOCUMENTS
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * HUGE_TOKENS)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, HUGE_DOCUMENTS, HUGE_DOCUMENTS + 1))
        file.seek(pointers - 4)
        file.write(struct.pack("<i", length))
        file.seek(pointers + 8 * (HUGE_DOCUMENTS - 1))
        file.write(struct.pack("<q", 2 * (HUGE_TOKENS - length)))
        file.seek(pointers + 16 * HUGE_DOCUMENTS)
        file.write(struct.pack("<q", HUGE_DOCUMENTS))


def sample_huge(prefix: str, world_size: int) -> None:
    """Open, sample from the first and a far batch, and print seconds, MB and the order that the ranks see together."""
    before, begun = peak(), time.perf_counter()
    windows = Windows(IndexedDataset(prefix), SEQ_LEN, sampler="epoch", seed=1)
    windows.batch(np.arange(BATCH))
    windows.batch(400_000_000 + np.arange(BATCH))
    seconds, megabytes = time.perf_counter() - begun, peak() - before
    order = np.empty(BATCH, np.int64)
    for rank in range(world_size):
        mine = np.arange(BATCH)[rank::world_size]
        order[mine] = Windows(windows.dataset, SEQ_LEN, sampler="epoch", seed=1).starts(mine)
    print(seconds, megabytes, hashlib.sha256(order.tobytes()).hexdigest())


def peak() -> float:
    """Most memory this process has had, MB. Its getrusage would count that of the process which started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def timed(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    if sys.argv[1:2] == [SAMPLE_HUGE]:
        sample_huge(sys.argv[2], int(sys.argv[3]))
    else:
        main()
