"""Files of every kind become the same documents, however they are compressed, cut into blocks or divided."""

import contextlib
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from data_common import AS_FILES, COMPRESSIONS, TEXTS, jsonl, read, table, texts_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.data import documents, readers, sources, streams
from megagpt.data.documents import Skipped
from megagpt.data.readers import Reading, blocks
from megagpt.data.sources import find, shard
from megagpt.errors import ConfigError


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "txt"])
def test_every_format_gives_the_same_documents_plain_or_compressed(tmp_path, kind, ending):
    compress = COMPRESSIONS[ending]
    if kind == "txt":
        paths = [tmp_path / f"{i}.txt{ending}" for i in range(len(TEXTS))]
        for path, text in zip(paths, TEXTS, strict=True):
            path.write_bytes(compress(text.encode()))
        assert read([tmp_path]) == TEXTS
        return
    content = jsonl(TEXTS) if kind == "jsonl" else table(TEXTS, "," if kind == "csv" else "\t")
    path = tmp_path / f"all.{kind}{ending}"
    path.write_bytes(compress(content))
    assert read([path], Reading(quoting="standard")) == TEXTS


def test_a_document_of_a_text_file_is_the_file_a_paragraph_or_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n\r\n \t\r\nthree\n\n\n\nfour")
    assert read([tmp_path / "a.txt"]) == ["one\ntwo\n\n \t\nthree\n\n\n\nfour"]
    assert read([tmp_path / "a.txt"], Reading("paragraph")) == ["one\ntwo", "three", "four"]
    assert read([tmp_path / "a.txt"], Reading("line")) == ["one", "two", "three", "four"]


def test_lines_that_are_no_documents_are_counted_with_their_place(tmp_path):
    bad = [
        b"not json",
        b'{"text": "cut',
        b'["a list"]',
        b'{"other": "key"}',
        b'{"text": 5}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": NaN}',
        b"[" * 100_000,
        b'{"text": "nul \\u0000 is fine"}',
        b"",
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(bad) + b"\n")
    skipped = Skipped()
    assert read([path], skipped=skipped) == ["nul \0 is fine"]
    assert sum(skipped.counts.values()) == 10
    assert skipped.bad == 9  # an empty text is no fault
    assert skipped.counts["key not found"] == skipped.counts["text is not a string"] == skipped.counts["empty"] == 1
    assert skipped.examples[0] == f"{path}:1: bad JSON"
    assert skipped.keys == {"other": 1}


def test_keys_are_remembered_in_bounded_memory():
    """Lines of a dictionary may have millions of different ones."""
    lines = [json.dumps({f"key {i}-{k}": 1 for k in range(20)} | {"body": "x"}) for i in range(1000)]
    total = Skipped()
    for i in range(0, 1000, 100):
        part = Skipped()
        block = readers.Block("jsonl", "\n".join(lines[i : i + 100]).encode(), "a.jsonl")
        assert list(documents.texts(block, "text", part)) == []
        total.add(part)
    assert total.counts == {"key not found": 1000}
    assert len(total.keys) <= 1000


def test_json_is_judged_the_same_without_orjson(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orjson", None)
    test_lines_that_are_no_documents_are_counted_with_their_place(tmp_path)


def test_text_that_is_not_utf8_is_kept_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    skipped = Skipped()
    assert read([tmp_path / "a.txt"], skipped=skipped) == ["caf\ufffd au lait"]
    assert (skipped.counts[documents.REPLACED], skipped.bad) == (1, 0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few bytes, so that small files have many."""
    for module in (readers, streams, sources):
        monkeypatch.setattr(module, "CHUNK", 64)
    monkeypatch.setattr(readers, "MAX_LINE", 600)
    monkeypatch.setattr(readers, "_LAST_RESORT", 8 * 64)


LINES = st.lists(st.text(st.sampled_from("ab é世\t,"), max_size=150), max_size=30)


@given(lines=LINES, ending=st.sampled_from(["\n", ""]), compressed=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_of_lines_hold_every_line_once(small_blocks, tmp_path_factory, lines, ending, compressed):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    data = ("\n".join(lines) + ending).encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    if data:
        expected = [line for line in "\n".join(lines).split("\n") if line.strip()]
        assert read([path], Reading("line")) == expected


@given(lines=LINES, n=st.integers(1, 6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_hold_every_line_once_and_in_order(small_blocks, tmp_path_factory, lines, n):
    folder = tmp_path_factory.mktemp("shards")
    for i in range(3):
        (folder / f"{i}.jsonl").write_bytes(jsonl(lines[i::3]))
    if not any(lines):
        return
    found = find([str(folder)], "auto", by_line=False)
    parts = []
    for i in range(1, n + 1):
        with contextlib.suppress(ConfigError):  # a part may be empty
            parts += texts_of(shard(found, i, n), AS_FILES)
    assert parts == texts_of(found, AS_FILES)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_byte_order_marks_do_not_depend_on_the_shard(tmp_path, n):
    """Files put one behind the other have them within."""
    (tmp_path / "a.txt").write_bytes(b"".join(f"\ufeffline {i}\nanother {i}\n".encode() for i in range(20)))
    found = find([str(tmp_path)], "auto", by_line=True)
    texts = [text for i in range(1, n + 1) for text in texts_of(shard(found, i, n), Reading("line"))]
    assert texts == [f"{word} {i}" for i in range(20) for word in ("line", "another")]


@given(text=st.text(st.sampled_from("ab .\n\té世\u3000"), min_size=1, max_size=2000))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_long_text_is_cut_into_pieces_that_are_the_text(small_blocks, tmp_path_factory, text):
    path = tmp_path_factory.mktemp("pieces") / "a.txt"
    path.write_bytes(text.encode())
    if not text.isspace():
        assert read([path]) == [text]
    found = list(blocks(find([str(path)], "auto", by_line=False), AS_FILES))
    assert [block.begins for block in found] == [True] + [False] * (len(found) - 1)
    assert [block.ends for block in found] == [False] * (len(found) - 1) + [True]


@given(text=st.text(st.sampled_from("ab\n \r"), max_size=800))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_paragraphs_do_not_depend_on_the_blocks(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("paragraphs") / "a.txt"
    path.write_bytes(text.encode())
    if not text:
        return
    expected = read([path], Reading("paragraph"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (readers, streams, sources):
            patch.setattr(module, "CHUNK", 16)
        assert read([path], Reading("paragraph")) == expected


@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_reading_goes_on_after_any_block(small_blocks, tmp_path, document, ending):
    rng = random.Random(0)
    for i in range(4):
        text = "".join(rng.choice("ab \n") for _ in range(rng.randrange(20, 400)))
        (tmp_path / f"{i}.txt{ending}").write_bytes(COMPRESSIONS[ending](text.encode()))
    found = find([str(tmp_path)], "auto", by_line=document == "line")
    everything = list(blocks(found, Reading(document)))
    assert len(everything) > 5
    for k, block in enumerate(everything):
        assert list(blocks(found, Reading(document), block.resume)) == everything[k + 1 :]


def test_a_line_too_long_is_skipped_without_being_held(small_blocks, tmp_path):
    lines = [b'{"text": "short"}', b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "also short"}']
    for data in (b"\n".join(lines), b"\n".join(lines[:2]), lines[1]):
        (tmp_path / "a.jsonl").write_bytes(data)
        skipped = Skipped()
        texts = read([tmp_path / "a.jsonl"], skipped=skipped)
        assert texts == [t for t in ("short", "also short") if t.encode() in data.replace(b"also short", b"")
                         or (t == "also short" and t.encode() in data)]  # fmt: skip
        assert skipped.bad == 1


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is found in /proc")
def test_a_bomb_of_one_endless_line_is_skipped_in_bounded_memory(tmp_path):
    """Three hundred megabytes of zeros in three hundred kilobytes."""
    zeros = gzip.compress(b"0" * 10_000_000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:1])) + zeros * 30)
    code = (
        "import re, sys; sys.path.insert(0, sys.argv[1]); from data_common import *; skipped = Skipped()\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024\n"
        "before = peak()  # getrusage would give the peak of the process that started this one\n"
        "assert read([sys.argv[2]], skipped=skipped) == TEXTS[:1] and skipped.bad == 1\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "a.jsonl.gz")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < 200


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_line_of_damaged_json_is_a_document_or_is_counted(data):
    lines = []
    for text in data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=8)):
        line = bytearray(json.dumps({"text": text}, ensure_ascii=data.draw(st.booleans())).encode())
        for _ in range(data.draw(st.integers(0, 3))):
            line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
        lines.append(bytes(line))
    skipped, content = Skipped(), b"\n".join(lines)
    found = list(documents.texts(readers.Block("jsonl", content, "a.jsonl"), "text", skipped))
    present = [line for line in content.split(b"\n") if line.strip()]
    assert len(found) + sum(skipped.counts.values()) == len(present)
    expected = []
    for line in present:
        with contextlib.suppress(Exception):
            expected.append(json.loads(line.decode())["text"])
    assert [text for text in found if text not in expected] == []
