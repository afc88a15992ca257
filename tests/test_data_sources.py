"""Which files an input names, and what each of them is, plain or compressed."""

import gzip
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from data_common import COMPRESSIONS, TEXTS, jsonl, read, zstd

from megagpt.data.sources import find, part_of, shard
from megagpt.errors import ConfigError, DataError


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
    (tmp_path / "alone").mkdir()
    (tmp_path / "empty.txt").rename(tmp_path / "alone" / "empty.txt")
    with pytest.raises(DataError, match=r"alone/empty\.txt: the file is empty"):  # of a folder the file is named
        find([str(tmp_path / "alone")], "auto", by_line=False)
    (tmp_path / "alone" / "empty.txt").unlink()
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


def test_a_name_that_promises_compression_has_to_keep_it(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(jsonl(TEXTS))
    with pytest.raises(DataError, match="not compressed as its name says"):
        read([tmp_path / "a.jsonl.gz"])


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


def test_text_of_an_unknown_ending_is_text(tmp_path):
    (tmp_path / "wiki.tokens").write_text("some text")
    assert read([tmp_path / "wiki.tokens"]) == ["some text"]


def test_a_shard_without_a_file_is_refused(tmp_path):
    Path(tmp_path / "a.txt").write_text("one")
    found = find([str(tmp_path / "a.txt")], "auto", by_line=False)
    with pytest.raises(ConfigError, match="--shard 1/2 has nothing to do"):
        shard(found, 1, 2)
    assert part_of(found[0], 0, 0) == []


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


def test_zstd_frames_may_follow_frames_to_be_skipped(tmp_path):
    frames = [zstd(jsonl([text])) for text in TEXTS]
    marked = [b"\x50\x2a\x4d\x18" + struct.pack("<II", 4, len(frame)) + frame for frame in frames]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(marked))
    assert read([tmp_path / "a.jsonl.zst"]) == TEXTS
