"""Reading DeepSpeed files: JSON, HJSON, base64, and everything that is none of them."""

import base64
import json
import os
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.deepspeed import load
from megagpt.config.source import read
from megagpt.errors import ConfigError

PLAIN = {"train_batch_size": 8, "zero_optimization": {"stage": 2}}


def written(tmp_path, text, name="ds.json"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def message(source):
    with pytest.raises(ConfigError) as caught:
        load(source)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1500
    return text


def test_json_is_read(tmp_path):
    assert load(written(tmp_path, json.dumps(PLAIN))) == PLAIN


def test_hjson_with_comments_and_without_quotes_is_read(tmp_path):
    text = "{\n  # eight sequences\n  train_batch_size: 8\n  zero_optimization: {stage: 2,}  // split gradients\n}\n"
    assert load(written(tmp_path, text)) == PLAIN


def test_base64_is_read_as_the_autotuner_passes_it():
    assert load(base64.urlsafe_b64encode(json.dumps(PLAIN).encode()).decode()) == PLAIN


def test_a_byte_order_mark_does_no_harm(tmp_path):
    assert load(written(tmp_path, b"\xef\xbb\xbf" + json.dumps(PLAIN).encode())) == PLAIN


def test_null_means_that_the_key_is_absent(tmp_path):
    text = '{"train_batch_size": 8, "steps_per_print": null, "zero_optimization": {"stage": 2, "overlap_comm": null}}'
    assert load(written(tmp_path, text)) == PLAIN


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"fp16": {"a": 1, "a": 1}}', "{a: 1\n a: 2}"], ids=str)
def test_a_key_given_twice_is_refused_by_name(tmp_path, text):
    assert 'key "a" occurs twice' in message(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("[1, 2]", "holds list, not a JSON object"),
        ('{"train_batch_size": 8,', "1:24"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "Infinity is no JSON number"),
        (b"\xff\xfe{}", "not UTF-8"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("{" + " " * (1 << 20) + "}", "1,048,578 bytes"),
        ('{"train_batch_size": ' + "9" * 5000 + "}", "digits"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(tmp_path, text, part):
    path = written(tmp_path, text)
    told = message(path)
    assert told.startswith(path)
    assert part in told


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path):
    path = written(tmp_path, "{}", "zero2_fp16.json")
    assert f"no such file (did you mean '{path}'?)" in message(str(tmp_path / "zero2_fp6.json"))


def test_a_folder_and_an_absurd_name_are_refused(tmp_path):
    assert "is a folder" in message(str(tmp_path))
    assert "x...: " in message("x" * 5000)
    assert r"'a\n\x00b': no such file" in message("a\n\0b")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can read every file")
def test_an_unreadable_file_says_so(tmp_path):
    path = written(tmp_path, "{}")
    os.chmod(path, 0)
    assert "Permission denied" in message(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_gives_an_object_or_a_config_error(tmp_path_factory, data):
    text = bytearray(json.dumps({**PLAIN, "fp16": {"enabled": True}, "wandb": {"team": "é"}}).encode())
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = written(tmp_path_factory.mktemp("fuzz"), bytes(text))
    with suppress(ConfigError):
        assert isinstance(read(path), dict)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_as_a_name_gives_an_object_or_a_config_error(text):
    with suppress(ConfigError):
        assert isinstance(read(text), dict)
