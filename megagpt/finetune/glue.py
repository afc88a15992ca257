"""A submission to the GLUE benchmark: the predictions of its test files, packed as its server wants them."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megagpt.errors import DataError
from megagpt.finetune.report import Run
from megagpt.finetune.score import better


class Entry(NamedTuple):
    """One file of a submission."""

    task: str
    split: str  # whose predictions it holds
    size: int  # rows of the public test file
    constant: str  # what to answer without a model


FILES = {
    "CoLA.tsv": Entry("cola", "test", 1063, "1"),
    "SST-2.tsv": Entry("sst2", "test", 1821, "1"),
    "MRPC.tsv": Entry("mrpc", "test", 1725, "1"),
    "STS-B.tsv": Entry("stsb", "test", 1379, "2.5"),
    "QQP.tsv": Entry("qqp", "test", 390_965, "0"),
    "MNLI-m.tsv": Entry("mnli", "test_matched", 9796, "entailment"),
    "MNLI-mm.tsv": Entry("mnli", "test_mismatched", 9847, "entailment"),
    "QNLI.tsv": Entry("qnli", "test", 5463, "not_entailment"),
    "RTE.tsv": Entry("rte", "test", 3000, "entailment"),
    "WNLI.tsv": Entry("wnli", "test", 146, "0"),
    "AX.tsv": Entry("mnli", "diagnostic", 1104, "entailment"),
}


def write_submission(runs: Sequence[Run], output: Path, *, fill: bool = False) -> list[str]:
    """Write the zip of all eleven files to ``output``; a note on each file that is not a run's whole answer.

    Of several runs of a task the one that is best on its first validation split answers. With ``fill``, files for which
    no run has predictions hold a constant answer; without, that is a DataError.
    """
    found = {name: _predictions(runs, entry) for name, entry in FILES.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing and not fill:
        raise DataError(
            f"no run has predictions for {', '.join(missing)}; fine-tune on these tasks with their test files, "
            "or answer them with a constant: --fill"
        )
    notes = [f"{name}: no run, a constant answer" for name in missing]
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in found.items():
            entry = FILES[name]
            answers = read_answers(path) if path else [(str(i), entry.constant) for i in range(entry.size)]
            if len(answers) != entry.size:
                notes.append(f"{name}: {len(answers):,} rows where the public test file has {entry.size:,}")
            rows = [f"{index}\t{_prediction(entry, answer)}\n" for index, answer in answers]
            archive.writestr(name, "index\tprediction\n" + "".join(rows))
    return notes


def read_answers(path: Path) -> list[tuple[str, str]]:
    """The (id, label) of a run's predictions file. Raises DataError where it is none."""
    try:
        header, *rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if header.split("\t")[:2] != ["id", "label"]:
        raise DataError(f"{path} does not begin with the columns id and label; it is no predictions file")
    return [tuple(row.split("\t")[:2]) for row in rows]


def _predictions(runs: Sequence[Run], entry: Entry) -> Path | None:
    """The predictions file of the best run of the entry's task that has one."""
    best, path = None, None
    for run in runs:
        file = run.folder / "predictions" / f"{entry.split}.tsv"
        if run.task != entry.task or not file.exists():
            continue
        metrics = next(iter(run.metrics.values()))
        name, value = next(iter(metrics.items()))
        if better(name, value, best):
            best, path = value, file
    return path


def _prediction(entry: Entry, answer: str) -> str:
    """Scores within the scale of the benchmark; names of classes as they are."""
    return f"{min(5.0, max(0.0, float(answer))):.3f}" if entry.task == "stsb" else answer
