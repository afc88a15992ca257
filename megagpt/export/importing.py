"""``megagpt import``: a model of Hugging Face's or OpenAI's as a folder that MegaGPT starts from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.config.flags import parse_flags
from megagpt.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from megagpt.data.tokenizer import Tokenizer
    from megagpt.model.config import GPTConfig
    from megagpt.model.tensors import Tensors


@dataclass(frozen=True)
class ImportSettings:
    """Read a model made elsewhere: megagpt import --from downloads/gpt2 --to models/gpt2"""

    from_: str  # a gpt2 or openai-gpt folder of Hugging Face's, or OpenAI's GPT-1 files
    to: str  # the folder to make; it must not exist
    tokenizer: str | None = None  # a tokenizer.json or a folder with vocabulary files, where there is none with it
    n_head: int = 12  # heads of OpenAI's GPT-1, whose files do not tell

    def __post_init__(self) -> None:
        if self.n_head < 1:
            raise ConfigError(f"--n_head {self.n_head} must be at least 1")
        for name in ("from_", "to"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name.rstrip('_')} is empty")


def import_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt import``. Raises a MegaGPTError for whatever the user can mend."""
    settings = parse_flags(ImportSettings, argv, prog="megagpt import")
    config = import_model(settings)
    print(
        f"{settings.to}: {config.n_params():,} parameters in {config.n_layer} blocks of width {config.d_model}, "
        f"{'GPT-2' if config.norm == 'pre' else 'GPT-1'}'s order; --init_from and --from take it"
    )
    return 0


def import_model(settings: ImportSettings) -> "GPTConfig":
    """Make the folder, with model.safetensors and tokenizer.json; the model's shape.

    Nothing is left behind where something fails. Raises CheckpointError, ConfigError, DataError or StorageError.
    """
    from megagpt.export.new_folder import check_new, new_folder
    from megagpt.model.tensors import write_safetensors
    from megagpt.train.manifest import WEIGHTS

    path, to = Path(settings.from_), Path(settings.to)
    check_new(to)
    config, tensors = _read(path, settings.n_head)
    tokenizer = _tokenizer(path, settings.tokenizer, config)
    about = {"config": json.dumps(config.to_dict()), "tokenizer_sha256": tokenizer.sha256}
    with new_folder(to, tensors.n_bytes + len(tokenizer.json) + 100_000) as folder:
        write_safetensors(folder / WEIGHTS, tensors, tensors.shapes, about)
        tokenizer.save(folder / "tokenizer.json")
    return config


def _read(path: Path, n_head: int) -> tuple["GPTConfig", "Tensors"]:
    from megagpt.export.openai_files import SHAPES, is_openai_folder, read_openai_folder
    from megagpt.model.hf_folder import CONFIG, is_hf_folder, read_hf_folder
    from megagpt.model.tensors import refuse_pickles
    from megagpt.train import manifest

    if is_hf_folder(path):
        return read_hf_folder(path)
    if is_openai_folder(path):
        return read_openai_folder(path, n_head)
    refuse_pickles(path)
    if manifest.folders(manifest.root_of(path)):
        raise ConfigError(f"{path} is a model of MegaGPT's already; --from and --init_from take it as it is")
    fault = "is neither" if path.exists() else "does not exist; give"
    raise CheckpointError(
        f"{path} {fault} a folder of Hugging Face's, with {CONFIG}, {'nor' if path.exists() else 'or'} one of OpenAI's "
        f"GPT-1, with {SHAPES}"
    )


def _tokenizer(path: Path, named: str | None, config: "GPTConfig") -> "Tokenizer":
    from megagpt.data.hf_vocabulary import hf_tokenizer
    from megagpt.data.tokenizer import load
    from megagpt.export.openai_files import is_openai_folder

    ours = named or (str(path) if is_openai_folder(path) else None)
    tokenizer = load(ours) if ours else hf_tokenizer(path)
    if tokenizer is None:
        raise ConfigError(f"{path} has no tokenizer.json, nor vocab.json and merges.txt; give one: --tokenizer PATH")
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {config.vocab_size:,} rows; "
            "give the one it was trained with: --tokenizer PATH"
        )
    return tokenizer
