"""What a user names with ``--from``, opened on one process without the training engine.

A run folder (its newest intact checkpoint), a checkpoint folder of any ZeRO stage, a ``.safetensors`` file, the run
folder of a fine-tuned model, an imported model, or a folder in Hugging Face's form. Small files are read first, so that
whatever is wrong is said before the weights are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt import dist
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.train import manifest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.data.tokenizer import Tokenizer
    from megagpt.model.config import GPTConfig
    from megagpt.model.gpt import GPT
    from megagpt.model.tensors import Tensors

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Source:
    """A model on disk and the tokenizer it reads.

    ``weights`` opens the weights, which are under the names of ``GPT``, or with ``finetuned`` under those of the
    classifier, in which the decoder is ``gpt.``. ``read_tokenizer`` reads the tokenizer. What is wrong with either is
    said then, as CheckpointError, ConfigError or DataError.
    """

    path: Path  # as it was named
    config: "GPTConfig"
    weights: Callable[[], "Tensors"]
    read_tokenizer: Callable[[], "Tokenizer"]
    tokenizer_sha256: str | None = None  # of the text it was trained on, where that is known
    finetuned: bool = False
    checkpoint: str | None = None  # the name of the one taken, global_step<N>, once it is settled
    find: Callable[[], Path] | None = None  # the checkpoint or file that ``path`` means now, verified; None: itself

    @property
    def step(self) -> int | None:
        """Of the checkpoint taken."""
        return None if self.checkpoint is None else manifest.step_of(Path(self.checkpoint))

    def settled(self) -> "Source":
        """This with the checkpoint that is taken: of a run folder the newest intact one, the same on every rank.

        A run that goes on saves newer ones meanwhile and deletes others, so rank 0 decides. Every rank calls this.
        Raises CheckpointError where there is none.
        """
        if self.find is None:
            return self
        found = dist.everywhere(lambda: str(self.find()) if dist.is_main() else None)
        place = Path(dist.gather_json(found)[0])
        kept = place.parent if place.suffix == ".safetensors" else place  # weights kept of a checkpoint lie in a folder
        name = kept.name if manifest.step_of(kept) is not None else None
        return replace(self, weights=lambda: _open_weights(place, verified=True), checkpoint=name, find=None)

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

    def build(self, device: "torch.device | str | None" = None, dtype: str = "fp32") -> "GPT":
        """The decoder in evaluation mode; on a GPU where there is one unless ``device`` says.

        ``dtype``, one of ``tensors.DTYPES``, is that of weights and arithmetic. Raises CheckpointError where the
        weights are not those of the model that is described with them.
        """
        import torch

        from megagpt.model.gpt import GPT
        from megagpt.model.tensors import torch_dtype
        from megagpt.ops import load_ops

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        wanted = torch_dtype(dtype)
        ops = load_ops("auto", head_width=self.config.head_width, dtype=wanted, device=device)
        with torch.device("meta"):  # the weights come from the file, so no memory is spent on initial ones
            model = GPT(self.config, ops)
        try:
            model.load_state_dict(self._decoder_weights(device, wanted), assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.path} does not hold the weights of the model it describes: {reason[:400]}"
            ) from None
        return model.requires_grad_(False).eval()

    def _decoder_weights(self, device, dtype) -> "dict[str, Tensor]":
        """One after the other, so that there is one model in memory and not a second one in float32."""
        weights, before = self.weights(), "gpt." if self.finetuned else ""
        names = [name for name in weights.shapes if name.startswith(before)]
        return {name.removeprefix(before): weights.read(name).to(device, dtype) for name in names}


def open_source(named: str | Path, *, tokenizer: str | None = None, finetuned: bool = False) -> Source:
    """What ``named`` is; its shape is read, tokenizer and weights are when they are asked for.

    ``tokenizer`` is a tokenizer.json in the place of the copy beside the model. Raises CheckpointError where there are
    no weights, and for fine-tuned ones unless ``finetuned`` allows them.
    """
    from megagpt.model.config import GPTConfig
    from megagpt.model.hf_folder import is_hf_folder, read_hf_folder

    if is_hf_folder(Path(named)):
        config, tensors = read_hf_folder(Path(named))
        return Source(Path(named), config, lambda: tensors, lambda: _read_hf_tokenizer(Path(named), tokenizer))
    path = manifest.weights_path(Path(named))
    about = manifest.read_source(path) if finetuned else manifest.read_decoder_source(path)
    try:
        config = GPTConfig.from_dict(about.model)
    except ConfigError as error:
        way = f"; give its folder, {path.parent}" if is_hf_folder(path.parent) else ""
        raise CheckpointError(f"{path} does not say which model its weights are of: {error}{way}") from None
    return Source(
        Path(named),
        config,
        weights=lambda: _open_weights(path),
        read_tokenizer=lambda: _read_tokenizer(str(path), tokenizer),
        tokenizer_sha256=about.tokenizer_sha256,
        finetuned=about.finetuned,
        find=lambda: _find_weights(path),
    )


def find_tokenizer(named: str, tokenizer: str | None = None) -> Path:
    """The tokenizer named by a flag, or the copy in the run folder that ``named`` is or lies in."""
    if tokenizer:
        return Path(tokenizer)
    path = Path(named)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, a checkpoint folder or a .safetensors file")
    folder = path.parent if path.suffix == ".safetensors" or manifest.step_of(path) is not None else path
    if folder.name == manifest.FOLDER:  # of <run folder>/checkpoints/global_step<N>
        folder = folder.parent
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


def _find_weights(path: Path) -> Path:
    from megagpt.train.weights import find_weights

    return find_weights(path)


def _open_weights(path: Path, *, verified: bool = False) -> "Tensors":
    from megagpt.train.weights import open_weights

    return open_weights(path, *([lambda folder: None] if verified else []))[0]
