"""What a fine-tuning run reads: the task's examples and the tokenizer, and from both the sequences of every split."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from megagpt.data.tokenizer import Tokenizer, from_file
from megagpt.errors import ConfigError, DataError
from megagpt.evaluate.source import find_tokenizer
from megagpt.finetune import own_data, tasks
from megagpt.finetune.batches import Encoded
from megagpt.finetune.examples import Split, TaskData
from megagpt.finetune.fields import REST, FinetuneSettings
from megagpt.finetune.score import check_metrics, default_metrics
from megagpt.finetune.spec import TaskSpec
from megagpt.finetune.transforms import N_TASK_TOKENS, TaskTokens, Texts, Transform, Unit, stream
from megagpt.model.config import GPTConfig

_GENERIC = ("train", "training", "data")  # names of files that say nothing of the task


def load_data(settings: FinetuneSettings) -> TaskData:
    """The task that the flags name, limited and changed as they say."""
    data = tasks.load_task(settings.task, settings.task_data) if settings.task else _own_data(settings)
    if settings.ordered_as == "number":
        if not data.ordinal:
            raise ConfigError("--ordered_as number is for a task with ordered classes, such as stsb")
        data = replace(data, kind="regress", labels=(), ordinal=False, metrics=default_metrics("regress", 0))
    if settings.task and settings.metrics:
        chosen = names(settings.metrics)
        check_metrics(chosen, data.kind, len(data.labels), ordinal=data.ordinal)
        data = replace(data, metrics=chosen)
    if settings.limit_train is None:
        return data
    return data.limited(settings.limit_train, settings.seed, rest_as_text=settings.unlabelled == REST)


def _own_data(settings: FinetuneSettings) -> TaskData:
    columns = own_data.Columns(
        settings.kind,
        text=names(settings.text_column),
        label=names(settings.label_column),
        choices=names(settings.choice_column or ""),
        id=settings.id_column,
        label_separator=settings.label_separator,
        quoting=settings.quoting,
    )
    return own_data.load_files(
        settings.train,
        {"valid": settings.valid},
        {"test": settings.test} if settings.test else None,
        columns,
        name=task_name(settings.train),
        metrics=names(settings.metrics or ""),
        n_choices=settings.n_choices,
        hierarchy=settings.hierarchy,
        unlabelled=None if settings.unlabelled == REST else settings.unlabelled,
    )


def task_name(train: str) -> str:
    """What the task of a user's files is called in reports: as the training file, or as its folder if that is train.*

    tickets.csv and tickets/train.csv are both "tickets".
    """
    path = Path(train)
    stem = path.name.split(".")[0]
    return path.absolute().parent.name or stem if stem.lower() in _GENERIC else stem


def names(text: str) -> tuple[str, ...]:
    """The words of a flag that holds several, a,b."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_tokenizer(settings: FinetuneSettings, sha256: str | None, model: GPTConfig) -> tuple[Path, Tokenizer]:
    """The pre-trained model's tokenizer, by its SHA-256 where that is known, and where it is.

    Raises DataError for another one.
    """
    path = find_tokenizer(settings.init_from, settings.tokenizer)
    tokenizer = from_file(path)
    if sha256 and tokenizer.sha256 != sha256:
        raise DataError(
            f"{path} is another tokenizer than the one that {settings.init_from} was trained with (SHA-256 "
            f"{tokenizer.sha256[:12]}... and {sha256[:12]}...); give that one: --tokenizer PATH"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"{path} has {tokenizer.vocab_size:,} tokens and the model {model.vocab_size:,}; "
            "give the tokenizer it was trained with: --tokenizer PATH"
        )
    return path, tokenizer


def transform_for(spec: TaskSpec, tokenizer: Tokenizer, model: GPTConfig) -> Transform:
    """How texts become sequences for ``model``, whose last rows are the task tokens."""
    return Transform(
        spec.kind,
        Texts(tokenizer, spec.clean),
        TaskTokens.after(model.vocab_size - N_TASK_TOKENS),
        min(spec.context or model.seq_len, model.seq_len),
        spec.document_tokens,
    )


def encode(split: Split, spec: TaskSpec, transform: Transform) -> Encoded:
    """A split as units and targets."""
    n_cut = sum(transform.cuts(e) for e in split.examples)
    return Encoded([transform.units(e) for e in split.examples], spec.targets(split.examples), n_cut)


def text_rows(data: TaskData, transform: Transform, seq_len: int) -> Encoded:
    """The task's training text, one text behind the other, cut into rows of the model's length."""
    examples = [*data.train.examples, *(data.unlabelled.examples if data.unlabelled else ())]
    ids = np.concatenate(stream(transform.texts, examples, transform.tokens))
    rows = [ids[i : i + seq_len] for i in range(0, len(ids), seq_len)]
    return Encoded([[Unit((row,), len(row) - 1)] for row in rows if len(row) > 1], None)
