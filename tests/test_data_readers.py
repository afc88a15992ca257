"""Files of every kind become the same documents, however they are compressed, cut into blocks or divided."""

import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megagpt.data import documents, readers, sources, streams
from megagpt.data.documents import Skipped
from megagpt.data.readers import Reading, blocks
from megagpt.data.sources import Source, find, part_of, shard
from megagpt.errors import ConfigError, DataError

TEXTS = ["First document.", 'Second,\twith a tab, "quotes" and\ntwo lines.', "Dritter Text: Grüße, 世界 🙂."]


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


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_parquet_gives_its_column(tmp_path, ending):
    (tmp_path / f"all.parquet{ending}").write_bytes(COMPRESSIONS[ending](parquet(TEXTS)))
    assert read([tmp_path / f"all.parquet{ending}"]) == TEXTS


def test_a_column_that_parquet_lacks_is_refused(tmp_path):
    (tmp_path / "all.parquet").write_bytes(parquet(TEXTS))
    with pytest.raises(DataError, match=r"no column 'txt' \(did you mean 'text'\?\); its columns are text"):
        read([tmp_path / "all.parquet"], Reading(column="txt"))


def test_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "all.parquet").write_bytes(parquet(TEXTS)[:-20])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read([tmp_path / "all.parquet"])


def test_quotes_are_ordinary_in_tsv_unless_said_otherwise(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\tan "odd\n2\tquote" here\n')
    assert read([tmp_path / "a.tsv"]) == ['an "odd', 'quote" here']


def test_a_column_without_a_header_has_a_number(tmp_path):
    (tmp_path / "a.tsv").write_text("gj04\t1\t\tOne sentence.\ngj04\t0\t*\tAnother one.\n")
    assert read([tmp_path / "a.tsv"], Reading(column="4")) == ["One sentence.", "Another one."]
    with pytest.raises(DataError, match=r"no column 'text'; its columns are gj04, 1, , One sentence\."):
        read([tmp_path / "a.tsv"])


def test_a_byte_order_mark_is_no_part_of_a_quoted_header(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbf"text","id"\r\n"one, two","1"\r\n')
    assert read([tmp_path / "a.csv"]) == ["one, two"]


def test_blank_lines_in_a_table_are_passed_over(tmp_path):
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_bytes(b"\n\r\nid,text\r\n\r\n1,one\r\n".replace(b",", delimiter.encode()))
        assert read([tmp_path / name]) == ["one"]


def test_a_line_end_within_a_field_costs_its_row_and_no_other(tmp_path):
    """The csv module stops at a carriage return outside of quotes, and with it a whole job did."""
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,od\rd\n2,two\n")
    (tmp_path / "a.tsv").write_bytes(b"id\ttext\n1\tod\rd\n2\ttwo\n")
    skipped = Skipped()
    assert read([tmp_path / "a.csv"], skipped=skipped) == ["two"]
    assert skipped.counts == {"row without text": 1}
    assert read([tmp_path / "a.tsv"]) == ["od\rd", "two"]


def test_a_quote_that_is_not_closed_is_an_error(tmp_path):
    """Otherwise the rest of the file would be one text."""
    (tmp_path / "a.csv").write_text('id,text\n1,"one\nmore"\n2,"two\n3,three\n4,four\n')
    with pytest.raises(DataError, match=r"a\.csv:4: a quote that opens in this row is not closed"):
        read([tmp_path / "a.csv"])
    assert read([tmp_path / "a.csv"], Reading(quoting="none"))[-1] == "four"


def test_a_row_that_is_too_short_is_counted(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2\n\n3,three\n")
    skipped = Skipped()
    assert read([tmp_path / "a.csv"], skipped=skipped) == ["one", "three"]
    assert skipped.counts == {"row without text": 1}


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


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_compressed_file_that_ends_too_early_is_an_error(tmp_path, ending, kept):
    data = COMPRESSIONS[ending](jsonl([str(random.Random(i).random()) for i in range(20_000)]))
    (tmp_path / f"a.jsonl{ending}").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(DataError, match=r"a\.jsonl.*: after [0-9,]+ bytes: .*; get the file again"):
        read([tmp_path / f"a.jsonl{ending}"])


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_several_compressed_streams_in_one_file_are_read_as_one(tmp_path, ending):
    compress = COMPRESSIONS[ending]
    (tmp_path / f"a.jsonl{ending}").write_bytes(compress(jsonl(TEXTS[:2])) + compress(jsonl(TEXTS[2:])))
    assert read([tmp_path / f"a.jsonl{ending}"]) == TEXTS


def test_a_name_that_promises_compression_has_to_keep_it(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(jsonl(TEXTS))
    with pytest.raises(DataError, match="not compressed as its name says"):
        read([tmp_path / "a.jsonl.gz"])


def test_inputs_that_name_nothing_are_refused(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00")
    (tmp_path / "empty.txt").write_bytes(b"")
    for text, message in {
        str(tmp_path / "missing.txt"): "no such file or folder",
        str(tmp_path / "*.jsonl"): "no file matches",
        str(tmp_path / "empty.txt"): "empty",
        str(tmp_path / "picture.png"): "unknown and it is not UTF-8 text",
    }.items():
        with pytest.raises(DataError, match=message):
            find([text], "auto", by_line=False)
    (tmp_path / "empty.txt").unlink()
    with pytest.raises(DataError, match="no file in this folder ends in"):
        find([str(tmp_path)], "auto", by_line=False)


def test_a_folder_is_searched_at_any_depth_but_not_in_hidden_places(tmp_path):
    for name in ("b/c/2.txt", "a/1.txt", ".git/3.txt", "a/.4.txt", "a/5.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read([tmp_path]) == ["a/1.txt", "b/c/2.txt"]
    assert read([tmp_path / "b/c/2.txt", tmp_path]) == ["b/c/2.txt", "a/1.txt"]


def test_a_pattern_may_match_folders(tmp_path):
    for name in ("books/1.txt", "books/old/2.txt", "3.txt", ".hidden/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read([tmp_path / "*"]) == ["3.txt", "books/1.txt", "books/old/2.txt"]
    assert read([tmp_path / "**"]) == read([tmp_path])


def test_folders_behind_links_are_searched_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.txt").write_text("one")
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "input")
    assert read([tmp_path / "input"]) == ["one"]


def test_a_file_named_twice_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one")
    assert read(["a.txt", "./a.txt", tmp_path, "../" + tmp_path.name]) == ["one"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path):
    """It was passed over in silence."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "closed").mkdir()
    tmp_path.chmod(0o755)
    (tmp_path / "closed").chmod(0)
    code = (
        "import os; from megagpt.data.sources import find; from megagpt.errors import DataError\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: find(['.'], 'auto', by_line=False)\n"
        "except DataError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert out.stdout == "./closed cannot be read: Permission denied\n", out.stderr


def test_a_pipe_is_refused(tmp_path):
    """Opening it would wait for a writer for ever, and the job may have to go back in it."""
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt is a pipe or a device"):
        find([str(tmp_path / "pipe.txt")], "auto", by_line=False)


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_is_refused_and_not_taken_for_damaged_utf8(tmp_path, encoding, ending):
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESSIONS[ending]("\ufeffGrüße".encode(encoding)))
    with pytest.raises(DataError, match="is UTF-16; convert it first: iconv"):
        find([str(tmp_path / f"a.txt{ending}")], "auto", by_line=False)


def test_a_json_file_holds_json_lines_where_it_is_named(tmp_path):
    """As Megatron-LM's users have them. In a folder such a file may be anything."""
    (tmp_path / "a.json").write_bytes(jsonl(TEXTS))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(jsonl(TEXTS)))
    (tmp_path / "c.txt").write_text("text")
    assert read([tmp_path / "a.json", tmp_path / "b.json.gz"]) == TEXTS * 2
    assert read([tmp_path]) == ["text"]


def test_zstd_frames_may_follow_frames_to_be_skipped(tmp_path):
    frames = [zstd(jsonl([text])) for text in TEXTS]
    marked = [b"\x50\x2a\x4d\x18" + struct.pack("<II", 4, len(frame)) + frame for frame in frames]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(marked))
    assert read([tmp_path / "a.jsonl.zst"]) == TEXTS


def test_text_of_an_unknown_ending_is_text(tmp_path):
    (tmp_path / "wiki.tokens").write_text("some text")
    assert read([tmp_path / "wiki.tokens"]) == ["some text"]


def test_a_shard_without_a_file_is_refused(tmp_path):
    Path(tmp_path / "a.txt").write_text("one")
    found = find([str(tmp_path / "a.txt")], "auto", by_line=False)
    with pytest.raises(ConfigError, match="--shard 1/2 has nothing to do"):
        shard(found, 1, 2)
    assert part_of(found[0], 0, 0) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is found in /proc")
def test_a_bomb_of_one_endless_line_is_skipped_in_bounded_memory(tmp_path):
    """Three hundred megabytes of zeros in three hundred kilobytes."""
    zeros = gzip.compress(b"0" * 10_000_000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:1])) + zeros * 30)
    code = (
        "import re, sys; sys.path.insert(0, sys.argv[1]); from test_data_readers import *; skipped = Skipped()\n"
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
