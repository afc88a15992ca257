"""``megagpt export``: a trained model as a folder that transformers loads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megagpt.config.flags import parse_flags
from megagpt.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megagpt.evaluate.source import Source
    from megagpt.export.check import Comparison
    from megagpt.finetune.spec import TaskSpec
    from megagpt.model.tensors import Tensors


@dataclass(frozen=True)
class ExportSettings:
    """Write a model as a folder for transformers: megagpt export --from runs/gpt1 --to exported/gpt1"""

    from_: str  # run folder, checkpoint folder, .safetensors file or run folder of finetune.py
    to: str  # the folder to make; it must not exist
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"  # of the weights that are written
    max_shard_size: str = "5GB"  # weights above this are cut into several files
    tokenizer: str | None = None  # a tokenizer.json; the run folder's by default

    def __post_init__(self) -> None:
        for name in ("from_", "to"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name.rstrip('_')} is empty")


def export_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt export``. Raises a MegaGPTError for whatever the user can mend."""
    settings = parse_flags(ExportSettings, argv, prog="megagpt export")
    comparison, n_files = export(settings)
    print(f"{settings.to}: {n_files} weight file{'s' * (n_files != 1)}, config, tokenizer and README.md")
    if comparison is None:
        print("not checked: transformers is not installed (pip install 'megagpt[eval]'), and README.md says so")
    else:
        print(f"largest logit difference to transformers {comparison.version}: {comparison.difference:.1e}")
    return 0


def export(settings: ExportSettings) -> tuple["Comparison | None", int]:
    """Make the folder; how far transformers' logits are from ours, None without transformers, and the weight files.

    Nothing is left behind where something fails. Raises CheckpointError, ConfigError, DataError or StorageError.
    """
    from megagpt.evaluate.source import open_source
    from megagpt.export.card import model_card
    from megagpt.export.new_folder import check_new, new_folder
    from megagpt.export.shards import parse_size, write_shards
    from megagpt.model.hf_folder import is_hf_folder

    to, most = Path(settings.to), parse_size(settings.max_shard_size)
    check_new(to)
    if is_hf_folder(Path(settings.from_)):
        raise ConfigError(f"{settings.from_} is in Hugging Face's form already; --from takes a model of MegaGPT's")
    source = open_source(settings.from_, tokenizer=settings.tokenizer, finetuned=True)
    spec = _spec(source) if source.finetuned else None
    if spec and settings.dtype != "fp32":
        raise ConfigError(f"--dtype {settings.dtype} is for language models; a fine-tuned one is written in fp32")
    tokenizer = source.tokenizer  # whatever is wrong with it is said before the weights are read
    source = source.settled()
    tensors, files = _converted(source, spec, settings.dtype)
    with new_folder(to, tensors.n_bytes + len(tokenizer.json) + 100_000) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        n_files = write_shards(folder, tensors, most)
        comparison = _compare(folder, source, spec, settings.dtype)
        card = model_card(
            to.name,
            source.config,
            comparison,
            dtype=settings.dtype,
            origin=_origin(source),
            tokenizer_sha256=tokenizer.sha256,
            spec=spec,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return comparison, n_files


def _origin(source: "Source") -> str:
    """What the card says of the place: names of the run and the checkpoint, and not where they lie."""
    path = source.path.absolute()
    run = path.parent.parent if path.name.startswith("global_step") else path
    name = source.checkpoint or path.name
    return name if run.name == name else f"{run.name}, {name}"


def _spec(source: "Source") -> "TaskSpec":
    """The task of a fine-tuned model, which has to be one that transformers' classes compute."""
    from megagpt.export.classifier import check_form
    from megagpt.finetune.spec import TaskSpec
    from megagpt.model.tensors import open_safetensors
    from megagpt.train.manifest import weights_path

    file = weights_path(source.path)
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{source.path} is a checkpoint of a fine-tuning run; give the run folder, whose model.safetensors has the "
            "best weights"
        )
    with open_safetensors(file, framework="np") as opened:
        spec = TaskSpec.from_dict(json.loads(opened.metadata()["task"]))
    check_form(spec)
    return spec


def _converted(source: "Source", spec: "TaskSpec | None", dtype: str) -> tuple["Tensors", dict[str, bytes]]:
    """The weights under transformers' names, and the small files by name."""
    from megagpt.export.classifier import as_classifier, classifier_config
    from megagpt.export.hf_tokenizer import DELIMITER, tokenizer_files, with_task_tokens
    from megagpt.model.hf_config import to_hf_config
    from megagpt.model.interop import as_transformers

    config, tokenizer, tensors = source.config, source.tokenizer, source.weights()
    if spec is None:
        about = to_hf_config(config, tokenizer.eot_id, dtype)
        generation = {name: about[name] for name in ("bos_token_id", "eos_token_id")}
        files = {"generation_config.json": _json(generation), **tokenizer_files(tokenizer, config.seq_len)}
        return as_transformers(tensors, config).rounded(dtype), {"config.json": _json(about), **files}
    about = classifier_config(config, spec, tokenizer.eot_id)
    longest = min(spec.context or config.seq_len, config.seq_len)
    files = tokenizer_files(with_task_tokens(tokenizer, config.vocab_size), longest, padding=DELIMITER)
    return as_classifier(tensors, config, spec), {"config.json": _json(about), **files}


def _compare(folder: Path, source: "Source", spec: "TaskSpec | None", dtype: str) -> "Comparison | None":
    from megagpt.export.check import check_tokenizer, compare, windows

    rows = source.config.vocab_size
    check_tokenizer(folder, source.tokenizer, task_tokens=(rows - 3, rows - 1) if spec else None)
    chosen = windows(source.tokenizer, source.config, task_tokens=spec is not None)
    if spec is None:
        return compare(folder, "AutoModelForCausalLM", lambda: _language_model(source, dtype), chosen)
    return compare(folder, "AutoModelForSequenceClassification", lambda: _classifier(source), chosen)


def _language_model(source: "Source", dtype: str):
    """The function from ids to logits, in float32 whatever the weights are rounded to."""
    import torch

    from megagpt.model.tensors import torch_dtype

    model = source.build("cpu").to(torch_dtype(dtype)).float()
    return lambda ids: model(torch.tensor([ids]))[0]


def _classifier(source: "Source"):
    import torch

    from megagpt.finetune import weights
    from megagpt.train.manifest import weights_path

    model, _ = weights.load(weights_path(source.path), "cpu")
    spec = model.spec
    return lambda ids: model.head(model.gpt.hidden(torch.tensor([ids]))[:, -1], None)[0] * spec.scale + spec.shift


def _json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
