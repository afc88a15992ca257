"""Text from a decoder, one token of every text a step; texts come and go between steps.

Past the context: the position table ends at C = ``seq_len``, so a text of more than C tokens is read from a later token
on. That is moved by half a context at a time: the model sees all of a text up to C tokens, and from there on always the
last C / 2 to C of them. Keys and values are computed anew once every C / 2 tokens and kept in between.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megagpt.errors import ConfigError
from megagpt.model.cache import KeyValueCache, Prefill, Step
from megagpt.model.decoding import for_decoding
from megagpt.model.sampling import Sampling, Stream, draw
from megagpt.ops.precision import product_dtype

_PREFILLED = 1 << 13  # tokens of prompts that are read at once


class Text:
    """A prompt and the tokens that come behind it.

    ``ids`` are both; ``finished`` says why nothing more comes: "stop" (a token of ``stop_ids``, which is not kept),
    "length" (``max_new_tokens``), or None while it goes on.
    """

    def __init__(
        self,
        prompt: Iterable[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 frozen
        stop_ids: Iterable[int] = (),
    ) -> None:
        self.ids = list(prompt)
        if not self.ids:
            raise ConfigError("an empty prompt has nothing to go on from; begin with the end-of-text token")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {max_new_tokens} must be at least 1")
        self.n_prompt = len(self.ids)
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.finished: str | None = None
        self._stream = Stream(sampling.seed)
        self._begin = 0  # the first token the model sees
        self._read = 0  # tokens from there on whose keys and values are kept

    @property
    def new(self) -> list[int]:
        return self.ids[self.n_prompt :]

    def _take(self, token: int) -> None:
        if token in self.stop_ids:
            self.finished = "stop"
            return
        self.ids.append(token)
        if len(self.ids) - self.n_prompt == self.max_new_tokens:
            self.finished = "length"


def window_begin(n: int, seq_len: int) -> int:
    """The first of ``n`` tokens that the model sees."""
    half = max(1, seq_len // 2)
    return 0 if n <= seq_len else -(-(n - seq_len) // half) * half


class Generation:
    """Texts that a model in evaluation mode goes on with, ``max_texts`` at once.

    Memory is taken once: keys and values of ``max_texts`` texts of ``max_tokens`` tokens, the model's context by
    default, and on a CPU the weights in a second layout where several texts gain by it; the model must not change
    meanwhile. Without ``cache``, and for a recurrent model, every step reads all of a text again. Tokens from
    ``vocab_size`` on, rows of the table that no text has, are never drawn.
    """

    def __init__(
        self,
        model,
        *,
        max_texts: int = 1,
        max_tokens: int | None = None,
        vocab_size: int | None = None,
        cache: bool = True,
    ) -> None:
        self.max_texts = max_texts
        self.seq_len = model.config.seq_len
        self.texts: list[Text] = []  # text i is row i of the cache
        self._table = model.wte.weight[:vocab_size]
        self._device = self._table.device
        self.model, self._linear = for_decoding(model, self._table, max_texts)
        self._cache = None
        if cache and model.config.backbone == "transformer":
            positions = min(max_tokens or self.seq_len, self.seq_len)
            self._cache = KeyValueCache(
                model.config, rows=max_texts, positions=positions, dtype=product_dtype(self._table), device=self._device
            )
        self._longest = max_tokens if self._cache and positions < self.seq_len else None

    @property
    def room(self) -> int:
        """How many more texts may join."""
        return self.max_texts - len(self.texts)

    def join(self, text: Text) -> None:
        """Let ``text`` take part from the next step on. Raises ConfigError for a prompt longer than the context."""
        if not self.room:
            raise ValueError(f"{self.max_texts} texts are being generated and there is room for no more")
        check_prompt(text.n_prompt, self.seq_len)
        if self._longest is not None and text.n_prompt + text.max_new_tokens > self._longest:
            raise ValueError(f"a text of {text.n_prompt} + {text.max_new_tokens} tokens and room for {self._longest}")
        text._begin = text._read = 0
        self.texts.append(text)

    def leave(self, text: Text) -> None:
        """Go on without ``text``; one that has finished has left already."""
        row, last = self.texts.index(text), len(self.texts) - 1
        self.texts[row] = self.texts[last]
        self.texts.pop()
        if self._cache and row != last:
            self._cache.move(last, row)

    @torch.inference_mode()
    def step(self) -> list[Text]:
        """Add a token to every text; the texts, of which those that ``finished`` have left."""
        texts = list(self.texts)
        if not texts:
            return []
        logits = self._next_logits(texts)
        for text, token in zip(texts, self._draw(texts, logits), strict=True):
            text._take(token)
            if text.finished:
                self.leave(text)
        return texts

    def _next_logits(self, texts: list[Text]) -> Tensor:
        """(B, V)"""
        self._move_windows(texts)
        if self._cache is None:
            seen = [torch.tensor([text.ids[text._begin :]], device=self._device) for text in texts]
            hidden = torch.cat([self.model.hidden(ids)[:, -1] for ids in seen])
            return self._linear(hidden, self._table)
        for rows in self._unread(texts):
            self._prefill(rows)
        step = Step(self._cache, [text._read for text in texts])
        ids = torch.tensor([[text.ids[-1]] for text in texts], device=self._device)
        for text in texts:
            text._read += 1
        return self._linear(self.model.read(ids, step)[:, 0], self._table)

    def _move_windows(self, texts: list[Text]) -> None:
        for text in texts:
            begin = window_begin(len(text.ids), self.seq_len)
            if begin != text._begin:
                text._begin, text._read = begin, 0

    def _unread(self, texts: list[Text]) -> Iterator[list[int]]:
        """Rows of which more than the last token is unread, as many at once as memory may be taken for."""
        rows = [i for i, text in enumerate(texts) if text._read < len(text.ids) - text._begin - 1]
        rows.sort(key=lambda i: len(texts[i].ids) - texts[i]._begin)
        while rows:
            longest = len(texts[rows[-1]].ids) - texts[rows[-1]]._begin
            n = max(1, _PREFILLED // longest)
            yield rows[-n:]
            del rows[-n:]

    def _prefill(self, rows: list[int]) -> None:
        """Read all but the last token, which is read in the step, of the texts in ``rows``."""
        texts = [self.texts[row] for row in rows]
        unread = [text.ids[text._begin : -1] for text in texts]
        T = max(map(len, unread))
        ids = torch.tensor([part + [0] * (T - len(part)) for part in unread], device=self._device)
        self.model.read(ids, Prefill(self._cache, rows, list(map(len, unread)), self.model.ops))
        for text, part in zip(texts, unread, strict=True):
            text._read = len(part)

    def _draw(self, texts: list[Text], logits: Tensor) -> list[int]:
        if all(text.sampling.temperature == 0 and text.sampling.repetition_penalty == 1 for text in texts):
            return logits.argmax(-1).tolist()
        drawn = [draw(logits[i], text.sampling, text._stream, text.ids) for i, text in enumerate(texts)]
        return torch.stack(drawn).tolist()


def check_prompt(n: int, seq_len: int) -> None:
    """Raise ConfigError for a prompt of ``n`` tokens that the model cannot see whole."""
    if n > seq_len:
        raise ConfigError(f"the prompt has {n:,} tokens and the model's context {seq_len:,}; shorten it")


def generate(
    model,
    ids: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_id: int | None = None,
    cache: bool = True,
) -> list[int]:
    """At most ``max_new_tokens`` ids that go on from ``ids`` (at least one), up to but without ``stop_id``."""
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    stop_ids = () if stop_id is None else (stop_id,)
    text = Text(ids, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids)
    generation = Generation(model, max_tokens=len(ids) + max_new_tokens, cache=cache)
    generation.join(text)
    while not text.finished:
        generation.step()
    return text.new
