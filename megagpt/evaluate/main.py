"""``megagpt generate``: text from a trained model."""

from dataclasses import dataclass
from pathlib import Path

from megagpt.config.flags import parse_flags
from megagpt.errors import CheckpointError, ConfigError

ALIASES = {"from": "run"}


@dataclass(frozen=True)
class GenerateSettings:
    """Continue a text with a trained model: megagpt generate --from runs/gpt1 --prompt 'It was a dark night'"""

    run: str  # run folder, checkpoint folder or .safetensors file (also --from)
    prompt: str = ""  # the text to continue; without one a new document begins
    max_tokens: int = 200  # tokens to add; fewer when the model ends the document
    temperature: float = 0.8  # 0 takes the likeliest token each time
    top_k: int = 0  # draw from the k likeliest tokens; 0 from all
    num_samples: int = 1  # texts to write
    seed: int = 1234  # the same seed writes the same texts
    tokenizer: str | None = None  # a tokenizer.json; the run folder's by default

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("num_samples", 1), ("top_k", 0), ("temperature", 0.0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least {least}")


def generate_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt generate``. Raises a MegaGPTError for whatever the user can mend."""
    _generate(parse_flags(GenerateSettings, argv, prog="megagpt generate", aliases=ALIASES))
    return 0


def _generate(settings: GenerateSettings) -> None:
    import torch

    from megagpt.data.tokenizer import from_file
    from megagpt.model.generate import generate

    tokenizer = from_file(find_tokenizer(settings.run, settings.tokenizer))
    ids = tokenizer.encode(settings.prompt) or _first_token(tokenizer)
    model = load_model(Path(settings.run), "cuda" if torch.cuda.is_available() else "cpu")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens and the model {model.config.vocab_size:,}; "
            "give the one it was trained with: --tokenizer PATH"
        )
    for i in range(settings.num_samples):
        new = generate(
            model,
            ids,
            max_new_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=settings.seed + i,
            stop_id=tokenizer.eot_id,
        )
        print(settings.prompt + continuation(tokenizer, ids, new), flush=True)


def continuation(tokenizer, ids: list[int], new: list[int]) -> str:
    """The text of ``new`` behind ``ids``: where tokens mark the ends of words, the space is between the two."""
    return tokenizer.decode([*ids, *new])[len(tokenizer.decode(ids)) :]


def load_model(path: Path, device: str):
    """The model saved at ``path`` in evaluation mode, fp32, on ``device``. Raises CheckpointError."""
    import torch

    from megagpt.model.config import GPTConfig
    from megagpt.model.gpt import GPT
    from megagpt.ops import load_ops
    from megagpt.train import manifest
    from megagpt.train.checkpoint import read_weights

    manifest.read_decoder_source(path)
    weights, values = read_weights(path)
    config = GPTConfig.from_dict(values)
    ops = load_ops("auto", head_width=config.head_width, dtype=torch.float32, device=device)
    with torch.device("meta"):  # the weights come from the file, so no memory is spent on initial ones
        model = GPT(config, ops)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not hold the weights of the model it describes: {reason[:400]}") from None
    return model.to(device).eval()


def find_tokenizer(run: str, tokenizer: str | None = None) -> Path:
    """The tokenizer named by a flag, or the copy in the run folder that ``run`` names or lies in."""
    if tokenizer:
        return Path(tokenizer)
    path = Path(run)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, a checkpoint folder or a .safetensors file")
    if path.name.startswith("global_step"):
        folder = path.parent.parent  # of <run folder>/checkpoints/global_step<N>
    else:
        folder = path if path.suffix != ".safetensors" else path.parent
    if not (folder / "tokenizer.json").exists():
        raise ConfigError(f"{folder} has no tokenizer.json; give the one the model was trained with: --tokenizer PATH")
    return folder / "tokenizer.json"


def _first_token(tokenizer) -> list[int]:
    if tokenizer.eot_id is None:
        raise ConfigError("this tokenizer has no token that begins a document; give a --prompt to continue")
    return [tokenizer.eot_id]
