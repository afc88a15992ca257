"""Which examples make a batch, in which order, and the tensors of a micro-batch.

The order of an epoch is a pure function of (seed, epoch), so the position in the data is one number. The weights in a
batch make the sum over all micro-batches and ranks the mean over the global batch, however it is cut: the engine
divides by accumulation steps and ranks, so each weight carries that factor.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megagpt.finetune.transforms import Unit
from megagpt.train.batches import BatchPlan

ORDERS = ("shuffled", "grouped")
_CHUNK = 50  # batches within which texts are sorted by length (fastai's SortishSampler)


@dataclass(frozen=True)
class Encoded:
    """The examples of a split as units, with their targets.

    ``targets`` (N, ...): class indices int64, indicators or soft classes float32 (N, K), numbers float32; None unknown.
    """

    units: list[list[Unit]]
    targets: np.ndarray | None
    n_cut: int = 0  # examples that are longer than the model reads

    def __len__(self) -> int:
        return len(self.units)

    def lengths(self) -> np.ndarray:
        """Tokens of each example, over all its sequences."""
        return np.array([sum(len(s) for u in units for s in u.sequences) for units in self.units])

    def longest(self) -> np.ndarray:
        """Tokens of each example's longest sequence, which decides the padding."""
        return np.array([max(len(s) for u in units for s in u.sequences) for units in self.units])


def epoch_batches(lengths: np.ndarray, batch: int, order: str, seed: int, epoch: int) -> list[np.ndarray]:
    """The examples of an epoch's batches; a last one may be short.

    ``shuffled``: any order. ``grouped``: texts of like length together, the batch with the longest one first, the
    others in random order, a short one last: moving it would shift the boundaries of all later ones.
    """
    rng = np.random.default_rng((seed, epoch))
    indices = rng.permutation(len(lengths))
    if order == "grouped":
        chunks = [indices[i : i + _CHUNK * batch] for i in range(0, len(indices), _CHUNK * batch)]
        indices = np.concatenate([chunk[np.argsort(-lengths[chunk], kind="stable")] for chunk in chunks])
    batches = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    if order != "grouped":
        return batches
    short = [batches.pop()] if len(batches[-1]) < batch else []
    if batches:
        first = max(range(len(batches)), key=lambda i: lengths[batches[i]].max())
        batches.insert(0, batches.pop(first))
        batches[1:] = [batches[1:][i] for i in rng.permutation(len(batches) - 1)]
    return batches + short


def padding_share(longest: np.ndarray, batches: list[np.ndarray]) -> float:
    """The part of ``batches`` that is padding when each is as long as its longest text."""
    slots = sum(len(batch) * int(longest[batch].max()) for batch in batches)
    return 1.0 - sum(int(longest[batch].sum()) for batch in batches) / slots


def collate(
    encoded: Encoded,
    indices: Sequence[int],
    *,
    n_real: int,
    example_weight: float,
    sequence_weight: float,
    gradient_windows: int | None = None,
) -> dict[str, Tensor]:
    """The tensors of a micro-batch; examples after the first ``n_real`` only fill it up and weigh nothing.

    S sequences, U units, B examples, T tokens of the longest sequence:
    ids (S, T) int64, 0 after a sequence's end; rows (N,) the real ones of the S T positions, one sequence behind the
    other: the positions that are computed; sequence (N,) which sequence a row is part of; predicting (N - S,) the rows
    with a next token; lengths (S,); unit (S,) which unit a sequence is part of; owner (U,) which example a unit is part
    of; extract (U,) the row of its extract token; targets (B, ...); example_weights (B,) and sequence_weights (S,)
    float32.

    With ``gradient_windows`` only so many last sequences of each unit are trained. The others come behind them: ids,
    rows and predicting are of those that are trained, early_ids and early_rows of the others; where there are none, of
    one more, for every rank makes the same calls.
    """
    units = [(b, unit) for b, i in enumerate(indices) for unit in encoded.units[i]]
    most = gradient_windows or max(len(unit.sequences) for _, unit in units)
    trained = [(u, b, ids) for u, (b, unit) in enumerate(units) for ids in unit.sequences[-most:]]
    early = [(u, b, ids) for u, (b, unit) in enumerate(units) for ids in unit.sequences[:-most]]
    sequences = trained + early
    lengths = np.array([len(ids) for _, _, ids in sequences])
    ends = np.cumsum(lengths[: len(trained)])
    last = np.cumsum([min(most, len(unit.sequences)) for _, unit in units]) - 1
    extract = (ends - lengths[: len(trained)])[last] + [unit.extract for _, unit in units]
    padded, rows = _table([ids for _, _, ids in trained])
    real = torch.arange(len(indices)) < n_real
    batch = {
        "ids": padded,
        "rows": rows,
        "sequence": torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        "predicting": torch.from_numpy(np.delete(np.arange(ends[-1]), ends - 1)),
        "lengths": torch.from_numpy(lengths),
        "unit": torch.tensor([u for u, _, _ in sequences]),
        "owner": torch.tensor([b for b, _ in units]),
        "extract": torch.from_numpy(extract),
        "example_weights": real * example_weight,
        "sequence_weights": real[torch.tensor([b for _, b, _ in sequences])] * sequence_weight,
    }
    if gradient_windows is not None:
        batch["early_ids"], batch["early_rows"] = _table([ids for _, _, ids in early or trained[:1]])
    if encoded.targets is not None:
        batch["targets"] = torch.from_numpy(encoded.targets[np.asarray(indices)])
    return batch


def _table(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Sequences below each other, filled up with 0, and which of the flattened positions are real."""
    lengths = np.array([len(ids) for ids in sequences])
    padded = np.zeros((len(sequences), lengths.max()), dtype=np.int64)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(padded), torch.from_numpy(np.flatnonzero(np.arange(padded.shape[1]) < lengths[:, None]))


class TaskBatches:
    """Endless micro-batches of this rank, from global batch number ``first`` on: ``next()`` gives :func:`collate`'s.

    The mean over sequences is one over those that are trained.
    """

    def __init__(
        self,
        encoded: Encoded,
        plan: BatchPlan,
        first: int,
        device,
        *,
        order: str,
        seed: int,
        drop_short: bool,
        gradient_windows: int | None = None,
    ) -> None:
        self._encoded, self._plan, self._device = encoded, plan, device
        self._order, self._seed = order, seed
        self._longest = encoded.longest()
        self._gradient_windows = gradient_windows
        most = gradient_windows or max(len(u.sequences) for units in encoded.units for u in units)
        self._sequences = np.array([sum(min(most, len(u.sequences)) for u in units) for units in encoded.units])
        self.steps_per_epoch = steps_per_epoch(len(encoded), plan.global_batch, drop_short)
        self._step, self._micro_step = first, 0
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])
        self.wait_s = 0.0

    def next(self) -> dict[str, Tensor]:
        begun = time.perf_counter()
        batch = self._micro_batch(self._global_batch(self._step), self._micro_step)
        self._micro_step = (self._micro_step + 1) % self._plan.accumulation
        self._step += self._micro_step == 0
        self.wait_s += time.perf_counter() - begun
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _global_batch(self, step: int) -> np.ndarray:
        epoch, i = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.epoch(epoch)
        return self._epoch[1][i]

    def epoch(self, number: int) -> list[np.ndarray]:
        """The global batches of an epoch that are trained on."""
        batches = epoch_batches(self._longest, self._plan.global_batch, self._order, self._seed, number)
        return batches[: self.steps_per_epoch]

    def _micro_batch(self, examples: np.ndarray, micro_step: int) -> dict[str, Tensor]:
        mine = examples[self._plan.indices(0, micro_step)[0] :][: self._plan.micro_batch]
        cut = self._plan.accumulation * self._plan.world_size
        return collate(
            self._encoded,
            mine if len(mine) else examples[:1],  # every rank makes every step, as ZeRO-3 needs
            n_real=len(mine),
            example_weight=cut / len(examples),
            sequence_weight=cut / int(self._sequences[examples].sum()),
            gradient_windows=self._gradient_windows,
        )

    def tokens(self, step: int) -> int:
        """Real tokens of global batch ``step``."""
        return int(self._lengths[self._global_batch(step)].sum())

    @property
    def _lengths(self) -> np.ndarray:
        if not hasattr(self, "_all_lengths"):
            self._all_lengths = self._encoded.lengths()
        return self._all_lengths

    def close(self) -> None:
        """Nothing is held."""


def steps_per_epoch(n: int, global_batch: int, drop_short: bool) -> int:
    """Global batches in a pass over ``n`` examples."""
    return n // global_batch if drop_short else -(-n // global_batch)
