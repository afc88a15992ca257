"""A sample of a corpus to train a tokenizer on: every file in proportion to its size, without reading all of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megagpt.data.clean import clean_gpt1
from megagpt.data.documents import Skipped, texts
from megagpt.data.progress import Progress
from megagpt.data.readers import Reading, blocks
from megagpt.data.sources import Source, part_of

_PLACES = 16  # parts of a large file of lines from which its share is taken


@dataclass
class Sample:
    """Texts of about ``n_bytes`` in all; all texts where there are fewer. They can be gone over again.

    A large file that can be entered anywhere gives parts from all along it, any other one its beginning. ``skipped``
    notes what was no text.
    """

    sources: list[Source]
    reading: Reading
    json_key: str
    clean: str
    n_bytes: int
    skipped: Skipped = field(default_factory=Skipped)

    def __iter__(self) -> Iterator[str]:
        self.skipped = Skipped()
        total = sum(source.size for source in self.sources)
        before = allowed = 0.0
        done = 0
        with Progress("sample", self.n_bytes) as progress:
            for source in self.sources:
                share = self.n_bytes * source.size / total
                allowed += share
                taken = 0
                for text in self._texts(source, allowed):
                    taken += len(text)
                    progress.update(round(before + min(taken, share)), done + taken)
                    yield clean_gpt1(text) if self.clean == "gpt1" else text
                allowed -= taken
                before += share
                done += taken

    def _texts(self, source: Source, n_bytes: float) -> Iterator[str]:
        """Texts of ``source`` until they are ``n_bytes`` long."""
        taken = 0
        for part in _spread(source, n_bytes):
            for block in blocks([part], self.reading):
                if taken >= n_bytes:
                    return
                for text in texts(block, self.json_key, self.skipped):
                    taken += len(text)
                    yield text


def _spread(source: Source, n_bytes: float) -> list[Source]:
    """``source``, or parts from all along it of ``n_bytes`` together where it is much larger and can be cut."""
    if not source.splittable or source.size < 2 * n_bytes:
        return [source]
    step, length = source.size // _PLACES, int(n_bytes / _PLACES)
    return [part for k in range(_PLACES) for part in part_of(source, k * step, k * step + length)]
