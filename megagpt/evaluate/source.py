"""What a user names with ``--from``, opened on one process without the training engine.

A run folder (its newest intact checkpoint), a checkpoint folder of any ZeRO stage, a ``.safetensors`` file, the run
folder of a fine-tuned model, an imported model, or a folder in Hugging Face's form. Small files are read first, so that
whatever is wrong is said before the weights are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.train import manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.data.tokenizer import Tokenizer
    from megagpt.model.config import GPTConfig
    from megagpt.model.gpt import GPT

WEIGHTS = "model.safetensors"  # of a fine-tuned run folder
_TOKENIZER = "tokenizer.json"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Source:
    """A model on disk and the tokenizer it reads.

    ``read`` reads the weights, anew at each call: float32 on the CPU under the names of ``GPT``, or with ``finetuned``
    under those of the classifier, in which the decoder is ``gpt.``. ``read_tokenizer`` reads the tokenizer. What is
    wrong with either is said then, as CheckpointError, ConfigError or DataError.
    """

    path: Path  # as it was named
    config: "GPTConfig"
    read: Callable[[], "dict[str, Tensor]"]
    read_tokenizer: Callable[[], "Tokenizer"]
    tokenizer_sha256: str | None = None  # of the text it was trained on, where that is known
    finetuned: bool = False

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """Raises ConfigError or DataError where there is none, or another one than the model was trained with."""
        found, sha256, rows = self.read_tokenizer(), self.tokenizer_sha256, self.config.vocab_size
        if found.vocab_size > rows:
            raise ConfigError(
                f"the tokenizer has {found.vocab_size:,} tokens and the model {rows:,}; "
                "give the one it was trained with: --tokenizer PATH"
            )
        if sha256 and found.sha256 != sha256:
            raise DataError(
                f"the tokenizer is another one than {self.path} was trained with (SHA-256 {found.sha256[:12]}... and "
                f"{sha256[:12]}...); give that one: --tokenizer PATH"
            )
        return found

    def build(self, device: "torch.device | str | None" = None, dtype: "torch.dtype | Precision" = "fp32") -> "GPT":
        """The decoder in evaluation mode; on a GPU where there is one unless ``device`` says.

        Raises CheckpointError where the weights are not those of the model that is described with them.
        """
        import torch

        from megagpt.model.gpt import GPT
        from megagpt.ops import load_ops

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = getattr(torch, _DTYPES[dtype]) if isinstance(dtype, str) else dtype
        ops = load_ops("auto", head_width=self.config.head_width, dtype=dtype, device=device)
        with torch.device("meta"):  # the weights come from the file, so no memory is spent on initial ones
            model = GPT(self.config, ops)
        try:
            model.load_state_dict(self._decoder_weights(device, dtype), assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.path} does not hold the weights of the model it describes: {reason[:400]}"
            ) from None
        return model.requires_grad_(False).eval()

    def _decoder_weights(self, device, dtype) -> "dict[str, Tensor]":
        weights = self.read()
        if self.finetuned:
            weights = {name.removeprefix("gpt."): x for name, x in weights.items() if name.startswith("gpt.")}
        return {name: x.to(device, dtype) for name, x in weights.items()}


def open_source(named: str | Path, *, tokenizer: str | None = None, finetuned: bool = False) -> Source:
    """What ``named`` is; its shape is read, tokenizer and weights are when they are asked for.

    ``tokenizer`` is a tokenizer.json in the place of the copy beside the model. Raises CheckpointError where there are
    no weights, and for fine-tuned ones unless ``finetuned`` allows them.
    """
    from megagpt.model.config import GPTConfig
    from megagpt.model.hf_folder import is_hf_folder, read_hf_folder

    if is_hf_folder(Path(named)):
        config, tensors = read_hf_folder(Path(named))
        return Source(Path(named), config, tensors.all, lambda: _read_hf_tokenizer(Path(named), tokenizer))
    path = weights_path(Path(named))
    about = manifest.read_source(path) if finetuned else manifest.read_decoder_source(path)
    try:
        config = GPTConfig.from_dict(about.model)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not say which model its weights are of: {error}") from None
    return Source(
        Path(named),
        config,
        read=lambda: _read_weights(path),
        read_tokenizer=lambda: _read_tokenizer(str(path), tokenizer),
        tokenizer_sha256=about.tokenizer_sha256,
        finetuned=about.finetuned,
    )


def weights_path(path: Path) -> Path:
    """Where the weights of ``path`` are: the file in a fine-tuned run's folder, otherwise ``path`` itself."""
    file = path / WEIGHTS
    return file if file.is_file() else path


def find_tokenizer(named: str, tokenizer: str | None = None) -> Path:
    """The tokenizer named by a flag, or the copy in the run folder that ``named`` is or lies in."""
    if tokenizer:
        return Path(tokenizer)
    path = Path(named)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, a checkpoint folder or a .safetensors file")
    if path.name.startswith("global_step"):
        folder = path.parent.parent  # of <run folder>/checkpoints/global_step<N>
    else:
        folder = path if path.suffix != ".safetensors" else path.parent
    if not (folder / _TOKENIZER).exists():
        raise ConfigError(f"{folder} has no {_TOKENIZER}; give the one the model was trained with: --tokenizer PATH")
    return folder / _TOKENIZER


def _read_tokenizer(named: str, tokenizer: str | None) -> "Tokenizer":
    from megagpt.data.tokenizer import from_file

    return from_file(find_tokenizer(named, tokenizer))


def _read_hf_tokenizer(folder: Path, tokenizer: str | None) -> "Tokenizer":
    from megagpt.data.hf_vocabulary import hf_tokenizer
    from megagpt.data.tokenizer import from_file

    found = from_file(tokenizer) if tokenizer else hf_tokenizer(folder)
    if found is None:
        raise ConfigError(f"{folder} has no {_TOKENIZER}; give the one the model was trained with: --tokenizer PATH")
    return found


def _read_weights(path: Path) -> "dict[str, Tensor]":
    from megagpt.train.weights import read_weights

    return read_weights(path)[0]
