"""The flags of ``finetune.py``: one frozen dataclass, a line of help for each, checked on construction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.config import shared
from megagpt.config.flags import parse_flags
from megagpt.config.shared import BELOW_ONE, MOST, MOST_FLOAT, BatchFlags, NeededFlags, OptimiserFlags, RunFlags
from megagpt.errors import ConfigError

REST = "rest"


@dataclass(frozen=True)
class _TaskFlags(NeededFlags):
    """What only ``finetune.py`` knows."""

    init_from: str  # the pre-trained model: a run folder, a checkpoint, a .safetensors file or an imported folder
    tokenizer: str | None = None  # the pre-trained model's tokenizer.json; the one in its run folder by default

    # the task: a published one ...
    task: str | None = None  # its name (megagpt tasks lists them), several as in cola,rte, or glue: RUN_DIR/cola, ...
    task_data: str | None = None  # folder with its files
    # ... or files of your own, CSV, TSV or JSON lines
    train: str | None = None  # training examples
    valid: str | None = None  # validation examples
    test: str | None = None  # examples to predict; labels may be missing
    # more texts, for the language model's phase of ulmfit; rest: of the examples that --limit_train leaves out
    unlabelled: str | None = None
    kind: Literal["classify", "entail", "similar", "choose", "multilabel", "regress"] = "classify"  # what is asked
    text_column: str = "text"  # column of the text, or two: premise,hypothesis
    label_column: str = "label"  # column of the label; multilabel: or a column of 0 and 1 for each label, a,b,c
    choice_column: str | None = None  # choose: columns of the choices, a,b,c, or one that holds a JSON list
    n_choices: int | None = None  # choose: how many choices each example must have; any number by default
    id_column: str | None = None  # column of the examples' names; rows are numbered without one
    quoting: Literal["auto", "standard", "none"] = "auto"  # of tables; auto: fields in quotes in CSV, none in TSV
    label_separator: str = "|"  # multilabel: between labels in one cell
    hierarchy: str = ""  # multilabel: what separates levels in a label, as / in animal/bird
    metrics: str | None = None  # what to compute, a,b; the first decides which checkpoint is best
    ordered_as: Literal["classes", "number"] = "classes"  # stsb: soft classes, or a number and its squared error

    # recipe and head
    recipe: str = "gpt1"  # gpt1, ulmfit, feature or a JSON file of phases
    head: str | None = None  # linear, pooled_mlp or scalar_mix; the recipe's by default
    epochs: int | None = None  # passes over the training examples (gpt1: 3; ulmfit: 5)
    lm_epochs: int | None = None  # ulmfit: passes over the text with the language model (1)
    lr: float | None = None  # highest rate (gpt1: 6.25e-5; ulmfit: 0.01 for the head)
    schedule: str | None = None  # gpt1: warmup_linear; ulmfit: stlr
    warmup: float | None = None  # share of the updates with a rising rate (gpt1: 0.002)
    lm_coef: float | None = None  # weight of the auxiliary language model (gpt1: 0.5)
    dropout: float | None = None  # of the decoder, all three rates
    head_dropout: float | None = None  # of what the head reads (0.1)
    dropout_multiplier: float | None = None  # ulmfit: of the article's rates (0.5)
    order: Literal["shuffled", "grouped"] | None = None  # of examples; grouped: like lengths together, less padding
    clean: Literal["none", "gpt1"] = "none"  # text cleaning: the one that the pre-training text was prepared with
    seq_len: int | None = None  # longest sequence; the pre-trained model's by default
    document_tokens: int | None = None  # long documents: read this many last tokens in windows, with a pooling head
    gradient_windows: int | None = None  # long documents: train through so many last windows; all by default
    patience: int | None = None  # stop after this many epochs without a better result
    preview: bool = False  # show phases, groups, rates and the schedule, and train nothing

    # studies
    n_transfer: int | None = None  # take embeddings and this many blocks of the pre-trained model; -1 nothing
    from_scratch: bool = False  # the same model without its pre-trained weights
    limit_train: float | None = None  # train on this many examples, or on this fraction of them
    seeds: str | None = None  # several runs, 1,2,3: RUN_DIR/seed1 and so on


@dataclass(frozen=True)
class FinetuneSettings(RunFlags, BatchFlags, OptimiserFlags, _TaskFlags):
    """Fine-tune a GPT: deepspeed finetune.py --ds_config ds_configs/cpu.json --task sst2 --task_data DIR
    --init_from runs/gpt1 --run_dir runs/sst2"""

    save_interval: int = 0  # steps between checkpoints beside those at the end of each epoch
    keep_last: int = 2  # checkpoints kept beside the best one; never fewer than two, for one may turn out damaged

    def __post_init__(self) -> None:
        problems = [*self._range_problems(), *self._source_problems()]
        if problems:
            raise ConfigError("; ".join(problems))

    def _range_problems(self):
        yield from shared.number_problems(self, _RANGES)
        if self.from_scratch and self.n_transfer not in (None, -1):
            yield f"--from_scratch takes nothing of the pre-trained model and --n_transfer is {self.n_transfer}"
        if self.seeds is not None and not all(word.strip().isdecimal() for word in self.seeds.split(",")):
            yield f"--seeds {self.seeds!r} is no list of whole numbers like 1,2,3"

    def _source_problems(self):
        yield from shared.text_problems(self, "init_from", "task", "task_data", "train", "valid")
        if (self.task is None) == (self.train is None):
            yield "give either --task NAME with --task_data FOLDER, or --train FILE with --valid FILE"
        elif self.task is not None and self.task_data is None:
            yield f"--task {self.task} needs --task_data, the folder with its files"
        elif self.train is not None and self.valid is None:
            yield "--train needs --valid, the examples that decide which checkpoint is best"
        if self.unlabelled == REST and self.limit_train is None:
            yield "--unlabelled rest is of the examples that --limit_train leaves out; give that too"
        elif self.unlabelled not in (None, REST) and self.task is not None:
            yield f"--unlabelled {self.unlabelled} goes with --train; with --task it can be rest"
        if self.gradient_windows is not None and self.document_tokens is None:
            yield "--gradient_windows is for long documents, which --document_tokens cuts in windows"
        if self.n_choices is not None and (self.task is not None or self.kind != "choose"):
            yield "--n_choices is for your own files of --kind choose; leave it out"

    @property
    def seed_list(self) -> list[int]:
        """The seeds of ``--seeds``; empty without it."""
        return [] if self.seeds is None else list(dict.fromkeys(int(word) for word in self.seeds.split(",")))


_RANGES = {
    **shared.RANGES,
    **dict.fromkeys(("epochs", "patience", "seq_len", "document_tokens", "gradient_windows"), (1, MOST, False)),
    "lm_epochs": (0, MOST, False),
    "lm_coef": (0.0, MOST_FLOAT, False),
    **dict.fromkeys(("lr", "limit_train"), (0.0, MOST_FLOAT, True)),
    **dict.fromkeys(("dropout", "head_dropout", "warmup"), (0.0, BELOW_ONE, False)),
    "dropout_multiplier": (0.0, math.nextafter(2.0, 0.0), False),
    "n_choices": (2, MOST, False),
    "n_transfer": (-1, MOST, False),
}


def parse(argv: Sequence[str] | None = None) -> FinetuneSettings:
    """The settings of ``finetune.py`` from its flags. Raises ConfigError in one line; ``--help`` prints and exits."""
    return parse_flags(FinetuneSettings, argv, prog="finetune.py", aliases=shared.ALIASES, bare=shared.BARE)
