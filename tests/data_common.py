"""What the tests of ``megagpt prepare`` share: inputs of every kind, a tokenizer, and a look at what came out."""

import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pytest

from megagpt.data import documents
from megagpt.data.bpe import parse_training, train
from megagpt.data.documents import Skipped
from megagpt.data.indexed import IndexedDataset
from megagpt.data.main import prepare_main
from megagpt.data.readers import Reading, blocks
from megagpt.data.sources import Source, find
from megagpt.data.tokenizer import from_file

PARAGRAPHS = [
    "The cat's whiskers weren't wet; they'd dried by 10:30.\n\nSo I'll go, we've gone, it's 3.14 -- isn't it?",
    'def parse(line):\n    """Split `line`."""\n    return [int(x) for x in line.split(\',\')]  # 1,2,3\n',
    "Zażółć gęślą jaźń. Привет, мир! 你好，世界。 こんにちは 🙂🙂 e\u0301\u00a0\u3000x\t\ty\r\n\r\nz",  # noqa: RUF001
]

TEXTS = ["First document.", 'Second,\twith a tab, "quotes" and\ntwo lines.', "Dritter Text: Grüße, 世界 🙂."]

NEEDS_PROC = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="children are found in /proc")

# what a process of its own runs: worker processes import the script that started them
COMMAND = "import sys; from megagpt.data.main import prepare_main; sys.exit(prepare_main(sys.argv[1:]))"


def write_tokenizer(path: Path) -> Path:
    """A small tokenizer."""
    train(PARAGRAPHS * 20, parse_training("train:400")).save(path)
    return path


def write_documents(folder: Path) -> list[str]:
    """Forty documents in three files, one of them compressed; the documents."""
    documents = [f"Document {i} says: {PARAGRAPHS[i % 3] * (i % 7 + 1)}" for i in range(40)]
    folder.mkdir()
    lines = [json.dumps({"text": document, "body": "x"}).encode() + b"\n" for document in documents]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:15]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[15:20])))
    (folder / "c.jsonl").write_bytes(b"".join(lines[20:]))
    return documents


def write_many(folder: Path) -> list[str]:
    """Some five megabytes in a plain and a compressed file, which take a few seconds."""
    lines = [json.dumps({"text": f"{i} {PARAGRAPHS[i % 3]}"}).encode() + b"\n" for i in range(30_000)]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:15_000]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[15_000:]), 1))
    return [str(folder / "a.jsonl"), str(folder / "b.jsonl.gz")]


def prepare(*args) -> int:
    return prepare_main([str(arg) for arg in args])


def documents_of(prefix) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), from_file(f"{prefix}.tokenizer.json")
    ids = [dataset.document(i) for i in range(len(dataset))]
    assert all(document[-1] == tokenizer.eot_id for document in ids)
    return [tokenizer.decode(document[:-1]) for document in ids]


def content(prefix) -> list[bytes]:
    return [Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")]


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


AS_FILES = Reading()
COMPRESSIONS = {"": lambda data: data, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def table(texts: list[str], delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    return out.getvalue().encode()


def parquet(texts: list[str]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": texts}), out)
    return out.getvalue()


def read(paths, reading: Reading = AS_FILES, *, format: str = "auto", key: str = "text", skipped=None) -> list[str]:
    """The documents of files, put together again where they were cut."""
    found = find([str(path) for path in paths], format, by_line=reading.document == "line")
    return texts_of(found, reading, key=key, skipped=skipped)


def texts_of(found: list[Source], reading: Reading, *, key: str = "text", skipped=None) -> list[str]:
    texts: list[str] = []
    for block in blocks(found, reading):
        for text in documents.texts(block, key, Skipped() if skipped is None else skipped):
            if block.begins:
                texts.append(text)
            else:
                texts[-1] += text
    return texts
