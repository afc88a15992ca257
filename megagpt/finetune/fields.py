"""The flags of ``finetune.py``: one frozen dataclass, a line of help for each, checked on construction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megagpt.config.fields import ALIASES, stop_signal
from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError

REST = "rest"


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tune a GPT: deepspeed finetune.py --ds_config ds_configs/cpu.json --task sst2 --task_data DIR
    --init_from runs/gpt1 --run_dir runs/sst2"""

    ds_config: str  # DeepSpeed's JSON or HJSON file (also --deepspeed_config, --deepspeed)
    init_from: str  # the pre-trained model: a run folder, a checkpoint or a .safetensors file
    run_dir: str  # folder of this run: model.safetensors, predictions, metrics.jsonl, summary.json
    tokenizer: str | None = None  # the pre-trained model's tokenizer.json; the one in its run folder by default

    # the task: a published one ...
    task: str | None = None  # its name; megagpt tasks lists them
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

    # studies
    n_transfer: int | None = None  # take embeddings and this many blocks of the pre-trained model; -1 nothing
    from_scratch: bool = False  # the same model without its pre-trained weights
    limit_train: float | None = None  # train on this many examples, or on this fraction of them
    seeds: str | None = None  # several runs, 1,2,3: RUN_DIR/seed1 and so on

    # the optimiser
    optimizer: Literal["adamw", "openai_adam", "apex"] | None = None  # adamw by default
    weight_decay: float | None = None  # decoupled, on matrices only (0.01)
    betas: tuple[float, float] | None = None  # Adam's decay rates of the two moments (0.9 0.999)
    eps: float | None = None  # Adam's epsilon (1e-8)

    # what the DeepSpeed file leaves open
    micro_batch_size: int | None = None  # examples a rank and forward pass
    gradient_accumulation_steps: int | None = None  # forward passes an optimiser step
    global_batch_size: int | None = None  # examples an optimiser step over all ranks (32)
    precision: Literal["fp32", "bf16", "fp16"] | None = None  # fp32 unless the DeepSpeed file says

    # what happens when
    log_interval: int = 10  # steps between log lines
    save_interval: int = 0  # steps between checkpoints beside those at the end of each epoch
    keep_last: int = 2  # checkpoints kept beside the best one
    patience: int | None = None  # stop after this many epochs without a better result
    seed: int = 1234  # of the head's initial values, the order of examples and dropout
    resume: str = "auto"  # auto: continue the run folder's run; never: refuse one; or the PATH of a checkpoint
    mirror: str | None = None  # a second folder to which each checkpoint is copied in the background
    async_save: bool = False  # write checkpoints in the background, from a copy in memory
    kernels: Literal["auto", "torch", "cpu", "triton"] = "auto"  # which operations; auto: the fastest that serve here
    activation_checkpointing: int = 0  # recompute every k-th block in the backward pass; 0 none, 1 all
    distributed_timeout_minutes: float = 10.0  # how long ranks wait for each other before the run ends
    rendezvous_timeout: float = 120.0  # seconds in which all ranks have to come to the meeting point
    hang_timeout: float | None = None  # seconds without progress that end the run; 540, and 1800 in setup and saves
    compare_ranks_interval: int = 1000  # steps between checks that all ranks hold the same model; 0 never
    restart_limit: int | None = None  # starts from one step without a new checkpoint; 3 for requeued jobs, 0 any number
    exit_duration_in_mins: float | None = None  # save and stop this long after the start, with exit code 75
    exit_signal: str | None = None  # a signal beside USR1 and TERM on which the run saves and stops: USR2, HUP, ...
    preview: bool = False  # show phases, groups, rates and the schedule, and train nothing

    def __post_init__(self) -> None:
        problems = [*self._range_problems(), *self._source_problems()]
        if problems:
            raise ConfigError("; ".join(problems))

    def _range_problems(self):
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not low <= number < high:
                    below = f" and below {high:g}" if high < _MOST else ""
                    yield f"--{name} {number:g} must be at least {low:g}{below}"
        for name in ("lr", "limit_train"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < _MOST:
                yield f"--{name} {getattr(self, name):g} must be above 0"
        if self.from_scratch and self.n_transfer not in (None, -1):
            yield f"--from_scratch takes nothing of the pre-trained model and --n_transfer is {self.n_transfer}"
        if self.seeds is not None and not all(word.strip().isdecimal() for word in self.seeds.split(",")):
            yield f"--seeds {self.seeds!r} is no list of whole numbers like 1,2,3"

    def _source_problems(self):
        for name in ("ds_config", "init_from", "run_dir", "resume", "mirror"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                yield f"--{name} is empty"
        if self.exit_signal is not None and stop_signal(self.exit_signal) is None:
            yield f"--exit_signal {self.exit_signal[:40]} is no signal to stop on; give USR2, HUP or another one"
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


_MOST = 1e18
_RANGES = {
    **dict.fromkeys(("epochs", "log_interval", "keep_last", "patience"), (1, _MOST)),
    **dict.fromkeys(("micro_batch_size", "gradient_accumulation_steps", "global_batch_size"), (1, _MOST)),
    **dict.fromkeys(("seq_len", "document_tokens", "gradient_windows"), (1, _MOST)),
    **dict.fromkeys(("lm_epochs", "save_interval", "seed", "activation_checkpointing"), (0, _MOST)),
    **dict.fromkeys(("compare_ranks_interval", "restart_limit"), (0, _MOST)),
    **dict.fromkeys(("lm_coef", "weight_decay", "eps"), (0.0, _MOST)),
    **dict.fromkeys(("dropout", "head_dropout", "warmup", "betas"), (0.0, 1.0)),
    "dropout_multiplier": (0.0, 2.0),
    "n_choices": (2, _MOST),
    "n_transfer": (-1, _MOST),
    **dict.fromkeys(
        ("distributed_timeout_minutes", "exit_duration_in_mins", "hang_timeout", "rendezvous_timeout"), (1e-3, _MOST)
    ),
}


def parse(argv: Sequence[str] | None = None) -> FinetuneSettings:
    """The settings of ``finetune.py`` from its flags. Raises ConfigError in one line; ``--help`` prints and exits."""
    bare = {"activation_checkpointing": "1", "deepspeed": None}
    return parse_flags(FinetuneSettings, argv, prog="finetune.py", aliases=ALIASES, bare=bare)
