"""From a corpus to training samples: which tokens sample i consists of, as a pure function of (seed, i).

No index is built and nothing is shuffled in memory, so a run starts at once at any corpus size, resumes at any sample,
and reads the same samples in the same order whatever the number of ranks. Worked example: sixteen tokens, seq_len 4,
sampler "epoch" gives the windows [0..4], [4..8], [8..12] (token 15 is left over); samples 0, 1, 2 are these three in a
permuted order, samples 3, 4, 5 the same three in another one.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from megagpt.data.indexed import IndexedDataset
from megagpt.data.permutation import permute, random_uint64, stream
from megagpt.errors import ConfigError, DataError, nearest

SAMPLERS = ("random", "epoch")
_IGNORED = -100  # a target that is not scored


class _InChunks:
    """A function of indices, computed for 4,096 at a time: a batch alone would mostly pay for numpy's calls.

    ``compute`` maps int64 (n,) to an array (..., n), each entry a function of its index only.
    """

    _SIZE = 4096

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray]) -> None:
        self._compute = compute
        self._last = (-1, np.empty(0))  # the chunk that the last call used, and its values

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        chunks = indices // self._SIZE
        if not len(chunks) or (chunks != chunks[0]).any():
            return self._compute(indices)
        first = int(chunks[0])
        number, values = self._last
        if number != first:
            values = self._compute(np.arange(first * self._SIZE, (first + 1) * self._SIZE, dtype=np.int64))
            self._last = (first, values)
        return values[..., indices % self._SIZE]


class Windows:
    """Samples of ``seq_len`` + 1 tokens, the inputs and the targets of ``seq_len`` predictions.

    ``random``: from a uniformly random start. ``epoch``: the corpus cut into windows that overlap by the one token
    that is a target in one and an input in the next; every window once an epoch, in a new order each epoch. Raises
    DataError for a corpus shorter than one sample.
    """

    def __init__(self, dataset: IndexedDataset, seq_len: int, *, sampler: str = "random", seed: int = 0) -> None:
        if sampler not in SAMPLERS:
            raise ConfigError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}{nearest(sampler, SAMPLERS)}")
        if dataset.n_tokens < seq_len + 1:
            raise DataError(
                f"{dataset.prefix} has {dataset.n_tokens:,} tokens and one sample of seq_len={seq_len} needs "
                f"{seq_len + 1:,}; prepare more text or lower --seq_len"
            )
        self.dataset = dataset
        self.seq_len = seq_len
        self.sampler = sampler
        self.n_windows = (dataset.n_tokens - 1) // seq_len  # samples an epoch
        self._seed = stream(seed, SAMPLERS.index(sampler))
        self._starts = _InChunks(self._random_starts if sampler == "random" else self._epoch_starts)

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Samples ``indices`` (any integers from 0 on): int64 (len(indices), seq_len + 1)."""
        return self.dataset.read(self.starts(indices), self.seq_len + 1).astype(np.int64)

    def starts(self, indices: np.ndarray) -> np.ndarray:
        """The first token of each sample, int64 (len(indices),)."""
        return self._starts(np.asarray(indices, np.int64))

    def _random_starts(self, indices: np.ndarray) -> np.ndarray:
        choices = np.uint64(self.dataset.n_tokens - self.seq_len)
        return (random_uint64(self._seed, indices) % choices).astype(np.int64)  # bias below choices / 2**64

    def _epoch_starts(self, indices: np.ndarray) -> np.ndarray:
        epoch, place = np.divmod(indices, self.n_windows)
        return permute(place, self.n_windows, random_uint64(self._seed, epoch)) * self.seq_len


class BlendRow(NamedTuple):
    """What a run sees of one corpus of a blend."""

    name: str
    weight: float
    samples: int
    epochs: float


class Blend:
    """Samples from several corpora in proportion to their weights, each corpus read in its own windows' order.

    Of the first n samples corpus s gets n * weight_s, to within about two samples at every multiple of 1,024 and with
    no table of choices: positions are permuted within blocks of 1,024, then a chain of decisions "corpus 1 or a later
    one", "corpus 2 or a later one", ... each spreads its share evenly. ``sources`` is [(weight > 0, Windows)], all of
    one seq_len.
    """

    _BLOCK = 1024

    def __init__(self, sources: list[tuple[float, Windows]], seed: int = 0) -> None:
        weights = [float(weight) for weight, _ in sources]
        if not sources or not all(0 < weight < float("inf") for weight in weights):
            raise ConfigError(f"the weights of a blend have to be above zero, found {weights}")
        total = sum(weights)
        self.windows = [windows for _, windows in sources]
        self.weights = [weight / total for weight in weights]
        self.seq_len = self.windows[0].seq_len
        self.n_windows = sum(windows.n_windows for windows in self.windows)
        self._dtype = np.result_type(*(windows.dataset.dtype for windows in self.windows))  # that holds all of theirs
        remaining = np.cumsum(self.weights[::-1])[::-1]
        # the share of corpus s among those from s on, in units of 2**-31; the last one takes all that is left
        self._shares = [round(w / rest * 2**31) for w, rest in zip(self.weights[:-1], remaining, strict=False)]
        self._seed = stream(seed, len(SAMPLERS))
        self._places = _InChunks(self._locate)

    def choose(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sample its corpus and its number within that corpus, both int64 (len(indices),)."""
        block, place = np.divmod(np.asarray(indices, np.int64), self._BLOCK)
        rest = block * self._BLOCK + permute(place, self._BLOCK, random_uint64(self._seed, block))
        source = np.full(len(rest), len(self._shares))
        within = np.zeros_like(rest)
        undecided = np.arange(len(rest))
        for s, share in enumerate(self._shares):
            taken = _scaled(rest, share)  # samples that corpus s got before this one
            mine = _scaled(rest + 1, share) > taken
            source[undecided[mine]], within[undecided[mine]] = s, taken[mine]
            rest, undecided = (rest - taken)[~mine], undecided[~mine]
        within[undecided] = rest
        return source, within

    def _locate(self, indices: np.ndarray) -> np.ndarray:
        """For each sample its corpus and its first token in it, int64 (2, len(indices))."""
        source, within = self.choose(indices)
        starts = np.empty_like(within)
        for s, windows in enumerate(self.windows):
            starts[source == s] = windows.starts(within[source == s])
        return np.stack([source, starts])

    def batch(self, indices: np.ndarray) -> np.ndarray:
        """Samples ``indices``: int64 (len(indices), seq_len + 1)."""
        source, starts = self._places(np.asarray(indices, np.int64))
        rows = np.empty((len(source), self.seq_len + 1), self._dtype)
        for s in np.unique(source):
            mine = np.flatnonzero(source == s)
            rows[mine] = self.windows[s].dataset.read(starts[mine], self.seq_len + 1)
        return rows.astype(np.int64)

    def table(self, n_samples: int) -> list[BlendRow]:
        """What the first ``n_samples`` samples take from each corpus."""
        rows = []
        for weight, windows in zip(self.weights, self.windows, strict=True):
            samples = round(weight * n_samples)
            rows.append(BlendRow(windows.dataset.prefix, weight, samples, samples / windows.n_windows))
        return rows


def _scaled(x: np.ndarray, share: int) -> np.ndarray:
    """floor(x * share / 2**31) of int64 ``x`` in exact arithmetic; share is at most 2**31."""
    high, low = x >> 31, x & (2**31 - 1)
    return high * share + (low * share >> 31)


class EvalWindows:
    """A validation set cut into windows of ``seq_len`` predictions: every token but the very first is scored once.

    ``stride`` tokens lie between the beginnings of two windows, ``seq_len`` unless given. Where they are fewer, a
    window after the first scores its last ``stride`` predictions alone: the earlier ones are of the window before, and
    each token is predicted from at least seq_len - stride tokens. ``batch`` gives inputs and targets; what is not
    scored has the target -100, and the end of the last window is padded with id 0.
    """

    def __init__(self, dataset: IndexedDataset, seq_len: int, stride: int | None = None) -> None:
        if dataset.n_tokens < 2:
            raise DataError(f"{dataset.prefix} has {dataset.n_tokens} tokens; a validation set needs at least two")
        self.dataset = dataset
        self.seq_len = seq_len
        self.stride = seq_len if stride is None else stride
        if not 0 < self.stride <= seq_len:
            raise ConfigError(f"a stride of {stride} has to be from 1 to the window's {seq_len}")
        self.n_windows = 1 + max(0, -(-(dataset.n_tokens - 1 - seq_len) // self.stride))

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of windows ``indices`` (each below n_windows), both int64 (len(indices), seq_len)."""
        T, n_tokens = self.seq_len, self.dataset.n_tokens
        ids = np.zeros((len(indices), T), np.int64)
        targets = np.full((len(indices), T), _IGNORED, np.int64)
        for row, index in enumerate(np.asarray(indices).tolist()):
            if not 0 <= index < self.n_windows:
                raise IndexError(f"window {index} of {self.n_windows}")
            start = index * self.stride
            window = self.dataset.read(np.array([start]), min(T + 1, n_tokens - start))[0]
            scored = T - self.stride if index else 0  # from here on
            ids[row, : len(window) - 1] = window[:-1]
            targets[row, scored : len(window) - 1] = window[1 + scored :]
        return ids, targets
