"""A sample of a corpus to train a tokenizer on: every file in proportion to its size, without reading all of them."""

from collections.abc import Iterator

from megagpt.data.clean import clean_gpt1
from megagpt.data.documents import Skipped, texts
from megagpt.data.readers import Reading, blocks
from megagpt.data.sources import Source, part_of

_PLACES = 16  # parts of a large file of lines from which its share is taken


def sample_texts(
    sources: list[Source], reading: Reading, json_key: str, *, clean: str, n_bytes: int, skipped: Skipped
) -> Iterator[str]:
    """Texts of about ``n_bytes`` in all; all texts where there are fewer. What is no text is noted in ``skipped``.

    A large file that can be entered anywhere gives parts from all along it, any other one its beginning.
    """
    total = sum(source.size for source in sources)
    allowed = 0.0
    for source in sources:
        allowed += n_bytes * source.size / total
        for part in _spread(source, allowed):
            for block in blocks([part], reading):
                if allowed <= 0:
                    break
                for text in texts(block, json_key, skipped):
                    allowed -= len(text)
                    yield clean_gpt1(text) if clean == "gpt1" else text


def _spread(source: Source, n_bytes: float) -> list[Source]:
    """``source``, or parts from all along it of ``n_bytes`` together where it is much larger and can be cut."""
    if not source.splittable or source.size < 2 * n_bytes:
        return [source]
    step, length = source.size // _PLACES, int(n_bytes / _PLACES)
    return [part for k in range(_PLACES) for part in part_of(source, k * step, k * step + length)]
