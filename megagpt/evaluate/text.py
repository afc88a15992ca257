"""From the tokens of a :class:`~megagpt.model.generate.Generation` to text, as they come."""

from collections.abc import Iterable, Iterator, Sequence

from megagpt.data.tokenizer import Tokenizer
from megagpt.model.generate import Generation, Text

_HALF = "\ufffd"  # what a part of a character is decoded as


class TextStream:
    """The text of tokens behind ``prompt``, given out once nothing that follows can change it.

    Held back are half characters and what may be the beginning of one of the ``stop`` strings, before which the text
    ends; then it is ``stopped``. All that is given out, one behind the other, is the text of the tokens together.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = tokenizer.decode, tuple(stop)
        # Where tokens mark the ends of words, the space is between two tokens: some that are known are decoded along.
        self._ids, self._known, self._read = list(prompt), max(0, len(prompt) - 8), len(prompt)
        self._held = ""
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """More tokens; the text that is certain now and was not before."""
        self._ids.extend(ids)
        text = self._decode(self._ids[self._known :])
        return "" if text.endswith(_HALF) else self._give(text)

    def close(self) -> str:
        """No more tokens come; the rest of the text."""
        return self._give(self._decode(self._ids[self._known :]), last=True)

    def _give(self, text: str, *, last: bool = False) -> str:
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._known : self._read])
        self._known, self._read = self._read, len(self._ids)
        if self._known == self._read:  # nothing is left to decode along
            self._known = max(0, self._read - 8)
        text = self._held + text[len(before) :]
        begins = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if begins:
            self.stopped, self._held = True, ""
            return text[: min(begins)]
        n = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n :]
        return text[: len(text) - n]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class Completion:
    """A text that is being generated, as text: ``text`` is what has come so far and is certain."""

    def __init__(self, tokenizer: Tokenizer, tokens: Text, stop: Sequence[str] = ()) -> None:
        self.tokens, self.text = tokens, ""
        self._stream, self._taken = TextStream(tokenizer, tokens.ids, stop), len(tokens.ids)

    @property
    def finished(self) -> str | None:
        """ "stop", at a stop string or a token that ends the text, "length", or None while it goes on."""
        return self.tokens.finished

    def advance(self, generation: Generation) -> str:
        """Take over the tokens that have come; the text that they add. At a stop string the text leaves."""
        piece = self._stream.push(self.tokens.ids[self._taken :])
        self._taken = len(self.tokens.ids)
        if self._stream.stopped:
            if not self.tokens.finished:
                generation.leave(self.tokens)
            self.tokens.finished = "stop"
        elif self.tokens.finished:
            piece += self._stream.close()
            if self._stream.stopped:
                self.tokens.finished = "stop"
        self.text += piece
        return piece


def complete(generation: Generation, completions: Iterable[Completion]) -> Iterator[tuple[Completion, str]]:
    """Generate all of them, as many at once as there is room for; each with the text that it got, whenever it got some.

    The last time, maybe with an empty piece, it is ``finished``.
    """
    waiting, running = iter(completions), {}
    while True:
        while generation.room and (completion := next(waiting, None)) is not None:
            generation.join(completion.tokens)
            running[completion.tokens] = completion
        if not running:
            return
        for tokens in generation.step():
            completion = running[tokens]
            piece = completion.advance(generation)
            if completion.finished:
                del running[tokens]
            if piece or completion.finished:
                yield completion, piece
