"""Speed of the data side on this machine: preparing a corpus, opening and sampling one, checked for equal results.

    python kernels/benchmarks/cpu_data.py [--rounds 5] [--output FOLDER]

Preparing is measured against what is usual elsewhere: a pool of processes that encodes one document at a time with
the `tokenizers` library. Both read the same JSON lines and write the same ids, which is checked. With MEGAGPT_DATA the
text is books under GPT-2's vocabulary, otherwise Python's standard library under one trained here.
"""

import contextlib
import hashlib
import io
import json
import lzma
import multiprocessing
import os
import re
import resource
import struct
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as the peer's users set it: there is a process for each core

import numpy as np
import timing

from megagpt.data.bpe import parse_training, train
from megagpt.data.indexed import HEADER, MAGIC, IndexedDataset
from megagpt.data.main import prepare_main
from megagpt.data.permutation import permute
from megagpt.data.stdlib_corpus import files
from megagpt.data.tokenizer import Tokenizer, from_file
from megagpt.data.windows import SAMPLERS, Blend, Windows

MEGABYTES = 12  # of text for preparing
SEQ_LEN, BATCH = 1024, 64


def main() -> None:
    args = timing.arguments(__doc__).parse_args()
    rounds = 1 if args.quick else args.rounds or 5
    report = timing.Report("cpu_data", timing.machine("tokenizers", "tiktoken", "numpy"), args.output)
    with tempfile.TemporaryDirectory(prefix="megagpt-bench-") as folder:
        report.add("prepare", *bench_prepare(Path(folder), rounds, quick=args.quick))
        report.add("reads", *bench_reads(Path(folder) / "ours-1", rounds))
        report.add("huge", *bench_huge(Path(folder)))


# -- preparing


def bench_prepare(folder: Path, rounds: int, *, quick: bool) -> tuple[dict, str]:
    """MB/s of ``megagpt prepare`` and of the pool, on one process and on all cores."""
    texts, tokenizer = quick_corpus() if quick else corpus()
    tokenizer.save(folder / "tokenizer.json")
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    figures, rows = {}, []
    for n in sorted({1, timing.cores()}):
        works = {"prepare": partial(ours, source, folder, n), "pool": partial(pool, source, folder, tokenizer, n)}
        seconds = timing.interleave({name: partial(timing.timed, work) for name, work in works.items()}, rounds)
        ids = (folder / "pool.bin").read_bytes()
        assert ids == (folder / f"ours-{n}.bin").read_bytes(), "the two differ in their ids"
        rates = {name: timing.spread(megabytes / s for s in values) for name, values in seconds.items()}
        ratio = timing.paired(seconds["pool"], seconds["prepare"])
        figures[n] = {"mb_per_s": rates, "ratio": ratio}
        rows.append([n, rates["prepare"], f"{rates['prepare'].median / n:.2f}", rates["pool"], ratio])
    header = ["processes", "megagpt prepare, MB/s", "a core", "per-document pool, MB/s", "x the pool's rate"]
    return figures, f"## Preparing {megabytes:.0f} MB, ids equal\n\n{timing.table(header, rows)}"


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


def quick_corpus() -> tuple[list[str], Tokenizer]:
    """Some modules of the standard library and a tokenizer trained on them in a moment."""
    texts = [Path(path).read_text(errors="replace") for path in files()[:20]]
    texts = [text for text in texts if text.strip()]
    return texts, train(texts, parse_training("train:512"))


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


def bench_reads(prefix: Path, rounds: int) -> tuple[dict, str]:
    """Tokens a second of batches from a file in memory, and the cost of a permuted index."""
    dataset = IndexedDataset(prefix)
    parts = {sampler: Windows(dataset, SEQ_LEN, sampler=sampler, seed=1) for sampler in SAMPLERS}
    parts["blend of two"] = Blend([(0.7, parts["random"]), (0.3, parts["epoch"])])
    batches = [np.arange(k * BATCH, (k + 1) * BATCH) for k in range(400)]
    works = {name: partial(fetch_all, windows, batches) for name, windows in parts.items()}
    for work in works.values():
        work()  # pages are mapped
    seconds = timing.interleave({name: partial(timing.timed, work) for name, work in works.items()}, rounds)
    tokens = len(batches) * BATCH * SEQ_LEN
    rates = {name: timing.spread(tokens / s / 1e6 for s in values) for name, values in seconds.items()}
    indices = np.arange(4096)
    permuting = timing.spread(timing.timed(lambda: permute(indices, 488_000_000, 1)) for _ in range(20))
    index_ns = 1e9 * permuting.median / len(indices)
    header = [f"hot reads, batches of {BATCH} x {SEQ_LEN}", "Mtokens/s (goal 500)"]
    text = f"{timing.table(header, rates.items())}\n\nPermuted index of 488 million: {index_ns:.0f} ns"
    return {"mtokens_per_s": rates, "permuted_index_ns": index_ns}, f"## Reading\n\n{text}"


def fetch_all(windows, batches: list[np.ndarray]) -> None:
    for indices in batches:
        windows.batch(indices)


# -- opening

HUGE_TOKENS, HUGE_DOCUMENTS = 10**12, 10**9
SAMPLE_HUGE = "--sample_huge"  # how the script starts itself, so that memory is measured in a fresh process


def bench_huge(folder: Path) -> tuple[dict, str]:
    """Seconds and memory to open a corpus of a million million tokens and take batches of it."""
    title = "## Opening and sampling 10^12 tokens in 10^9 documents"
    prefix = folder / "huge"
    try:
        write_huge(prefix)
    except OSError as error:
        return {}, f"{title}\n\nNot measured: this file system has no sparse files of that size ({error})."
    orders = {}
    for world_size in (1, 2, 8):
        command = [sys.executable, __file__, SAMPLE_HUGE, str(prefix), str(world_size)]
        out = subprocess.run(command, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        *numbers, orders[world_size] = out.stdout.split()
    assert len(set(orders.values())) == 1, "the order depends on the number of ranks"
    seconds, megabytes = map(float, numbers)
    text = f"{seconds:.3f} s (goal 0.5), {megabytes:.1f} MB (goal 64); the same order on 1, 2 and 8 ranks."
    return {"seconds": seconds, "megabytes": megabytes}, f"{title}\n\n{text}"


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
    before, begun = resident(), time.perf_counter()
    windows = Windows(IndexedDataset(prefix), SEQ_LEN, sampler="epoch", seed=1)
    windows.batch(np.arange(BATCH))
    windows.batch(400_000_000 + np.arange(BATCH))
    seconds, megabytes = time.perf_counter() - begun, peak() - before
    order = np.empty(BATCH, np.int64)
    for rank in range(world_size):
        mine = np.arange(BATCH)[rank::world_size]
        order[mine] = Windows(windows.dataset, SEQ_LEN, sampler="epoch", seed=1).starts(mine)
    print(seconds, megabytes, hashlib.sha256(order.tobytes()).hexdigest())


def resident() -> float:
    """MB that this process has in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak() -> float:
    """Most memory this process has had, MB. Its getrusage would count that of the process which started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == [SAMPLE_HUGE]:
        sample_huge(sys.argv[2], int(sys.argv[3]))
    else:
        main()
