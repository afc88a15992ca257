"""The data of a run: which corpora it trains and validates on, checked against the model before anything starts."""

from dataclasses import dataclass

from megagpt.data.indexed import IndexedDataset
from megagpt.data.windows import Blend, EvalWindows, Windows
from megagpt.errors import DataError

_WARN_EPOCHS = 1.5  # passes over one corpus of a blend from which on the user is told


@dataclass(frozen=True)
class Corpora:
    """Everything a run reads: ``train`` gives sample i as a pure function of (seed, i)."""

    train: Blend | Windows
    parts: list[IndexedDataset]
    valid: dict[str, EvalWindows]
    order: dict  # sampler, seed and weights

    @property
    def identity(self) -> dict:
        """What a checkpoint records, so that a resumed run is known to read the same samples in the same order."""
        return {
            "train": [part.identity() for part in self.parts],
            "tokenizer_sha256": self.tokenizer_sha256,
            **self.order,
        }

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary of the training corpora, or None where none has a sidecar to say."""
        return next((part.info.vocab_size for part in self.parts if part.info), None)

    @property
    def tokenizer_sha256(self) -> str | None:
        """Of the training corpora's tokenizer, or None where none has a sidecar to say."""
        return next((part.info.tokenizer_sha256 for part in self.parts if part.info), None)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise DataError where a corpus holds ids that a model of ``vocab_size`` rows has no row for."""
        for dataset in [*self.parts, *(windows.dataset for windows in self.valid.values())]:
            needed = dataset.needed_vocabulary()
            if needed is None:  # told when such an id comes up: reading the whole corpus first would take too long
                dataset.refuse_ids_from(vocab_size)
            elif needed > vocab_size:
                raise DataError(
                    f"{dataset.prefix} needs a vocabulary of {needed:,} and the model has {vocab_size:,}; "
                    f"use --vocab_size {needed} or prepare the corpus with the model's tokenizer"
                )

    def check_tokenizer(self, sha256: str | None, weights: str) -> None:
        """Raise DataError where ``weights`` were trained on text of another tokenizer, the one with this SHA-256."""
        ours = self.tokenizer_sha256
        if sha256 and ours and sha256 != ours:
            raise DataError(
                f"{self.parts[0].prefix} was made with another tokenizer than the text that {weights} was trained on "
                f"(SHA-256 {ours[:12]}... and {sha256[:12]}...); prepare it with that run's tokenizer.json"
            )


def open_corpora(
    blend: list[tuple[float, str]], valid: dict[str, str], *, seq_len: int, sampler: str, seed: int
) -> Corpora:
    """Open and check all corpora of a run: ``blend`` of (weight, prefix), ``valid`` {name: prefix}.

    Raises DataError.
    """
    parts = [IndexedDataset(prefix) for _, prefix in blend]
    valid_sets = {name: EvalWindows(IndexedDataset(prefix), seq_len) for name, prefix in valid.items()}
    _check_one_tokenizer([*parts, *(windows.dataset for windows in valid_sets.values())])
    windows = [Windows(part, seq_len, sampler=sampler, seed=seed) for part in parts]
    train = (
        windows[0]
        if len(windows) == 1
        else Blend([(w, x) for (w, _), x in zip(blend, windows, strict=True)], seed=seed)
    )
    total = sum(weight for weight, _ in blend)
    order = {"sampler": sampler, "seed": seed, "weights": [weight / total for weight, _ in blend]}
    return Corpora(train, parts, valid_sets, order)


def _check_one_tokenizer(datasets: list[IndexedDataset]) -> None:
    first, *others = [dataset for dataset in datasets if dataset.info] or [None]
    for other in others:
        if other.info.tokenizer_sha256 != first.info.tokenizer_sha256:
            raise DataError(
                f"{other.prefix} was made with another tokenizer than {first.prefix} (SHA-256 "
                f"{other.info.tokenizer_sha256[:12]}... and {first.info.tokenizer_sha256[:12]}...); prepare it with "
                f"--tokenizer {first.prefix}.tokenizer.json"
            )


def data_lines(corpora: Corpora, samples: int) -> list[str]:
    """What a run of ``samples`` windows sees of each corpus, one line each, and what about it deserves a warning."""
    lines = []
    if isinstance(corpora.train, Blend):
        for row in corpora.train.table(samples):
            note = "  <- seen more than once and a half" if row.epochs > _WARN_EPOCHS else ""
            lines.append(
                f"data {row.name}: weight {row.weight:.3f}, {row.samples:,} samples, {row.epochs:.3g} epochs{note}"
            )
    else:
        epochs = samples / corpora.train.n_windows
        lines.append(f"data {corpora.parts[0].prefix}: {samples:,} samples, {epochs:.3g} epochs")
    trained_on = [part.identity() for part in corpora.parts]
    for name, windows in corpora.valid.items():
        if windows.dataset.identity() in trained_on:
            lines.append(f"WARNING: the validation set {name} is trained on as well; its losses say nothing")
    return lines
