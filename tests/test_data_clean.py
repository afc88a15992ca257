"""GPT-1's cleaning, rule by rule, and the shuffling of sentences."""

import sys

import pytest

from megagpt.data.clean import clean_gpt1, shuffle_sentences


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a—b–c―d", "a - b - c - d"),  # noqa: RUF001
        ("wait… it´s", "wait... it's"),  # noqa: RUF001
        ('"why?!"', '" why ? ! "'),
        ("a--b!!!c", "a -- b !!! c"),
        ("(x)[y]{z}|w_v", "( x ) [ y ] { z } | w _ v"),
        ("a+b*c/d~e;f,g", "a + b * c / d ~ e ; f , g"),
        ("dots... stay. <here> & #1 a\\b c:d 'e' f=g", "dots... stay. <here> & #1 a\\b c:d 'e' f=g"),
        ("one  \t two", "one two"),
        ("one  \n\n  two\nthree", "one \n two \n three"),
        ("  ends \n", "ends"),
    ],
)
def test_text_is_cleaned_as_gpt1s_authors_did(text, cleaned):
    assert clean_gpt1(text) == cleaned


def test_wrong_decodings_are_repaired_where_ftfy_is_installed():
    pytest.importorskip("ftfy")
    assert clean_gpt1("schÃ¶n") == "schön"


def test_without_ftfy_characters_are_composed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_gpt1("scho\u0308n") == "schön"


def test_shuffling_keeps_all_sentences_and_does_the_same_each_time():
    text = "One. Two! Three? Four. Five. Six. Seven."
    shuffled = shuffle_sentences(text)
    assert shuffled != text
    assert sorted(shuffled.split()) == sorted(text.split())
    assert shuffle_sentences(text) == shuffled
