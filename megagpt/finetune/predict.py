"""``megagpt predict``: the answers of a fine-tuned model for the rows of a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megagpt.config.flags import parse_flags
from megagpt.errors import CheckpointError, ConfigError, DataError

ALIASES = {"run": "from"}


@dataclass(frozen=True)
class PredictSettings:
    """Answer for every row of a file: megagpt predict --from runs/sst2 --input new.tsv --output out.tsv"""

    from_: str  # run folder of finetune.py, or its model.safetensors
    input: str  # CSV, TSV or JSON lines
    output: str  # the file to write: id, label and probabilities, separated by tabs
    text_column: str | None = None  # column of the text, or two; those of the training file by default
    choice_column: str | None = None  # columns of the choices; those of the training file by default
    id_column: str | None = None  # column of the rows' names; they are numbered without one
    quoting: Literal["auto", "standard", "none"] = "auto"  # of tables; auto: fields in quotes in CSV, none in TSV
    tokenizer: str | None = None  # a tokenizer.json; the run folder's by default
    batch_size: int = 32  # rows at once

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size {self.batch_size} must be at least 1")
        for name in ("from_", "input", "output"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name.rstrip('_')} is empty")


def predict_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt predict``. Raises a MegaGPTError for whatever the user can mend."""
    settings = parse_flags(PredictSettings, argv, prog="megagpt predict", aliases=ALIASES)
    n = predict_file(settings)
    print(f"{n:,} rows answered in {settings.output}")
    return 0


def predict_file(settings: PredictSettings) -> int:
    """Write the answers; the number of rows. Nothing is written where a row cannot be answered."""
    import torch

    from megagpt.data.tokenizer import from_file
    from megagpt.evaluate.source import find_tokenizer
    from megagpt.finetune import evaluation, weights
    from megagpt.finetune.batches import Encoded
    from megagpt.finetune.inputs import names, transform_for
    from megagpt.finetune.own_data import Columns, load_inputs
    from megagpt.finetune.results import table, write

    path = Path(settings.from_)
    file = path if path.suffix == ".safetensors" else path / weights.MODEL
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; give the folder of a finished run of finetune.py")
    tokenizer = from_file(find_tokenizer(str(file), settings.tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, sha256 = weights.load(file, device)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{file} was trained with another tokenizer; give that one: --tokenizer PATH")
    spec = model.spec
    columns = Columns(
        spec.kind,
        text=names(settings.text_column or "") or spec.text_columns,
        choices=names(settings.choice_column or "") or spec.choice_columns,
        id=settings.id_column,
        quoting=settings.quoting,
    )
    examples = load_inputs(settings.input, columns).examples
    transform = transform_for(spec, tokenizer, model.gpt.config)
    encoded = Encoded([transform.units(e) for e in examples], None)
    outputs, _ = evaluation.answers(model, encoded, device=device, batch_size=settings.batch_size)
    write(Path(settings.output), table(examples, outputs, spec), "another --output")
    return len(examples)
