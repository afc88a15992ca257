"""``megagpt generate``: text from a trained model."""

from dataclasses import dataclass

from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError
from megagpt.evaluate.source import open_source

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
    from megagpt.model.generate import generate

    source = open_source(settings.run, tokenizer=settings.tokenizer)
    tokenizer = source.tokenizer
    ids = tokenizer.encode(settings.prompt) or _first_token(tokenizer)
    model = source.build()
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


def _first_token(tokenizer) -> list[int]:
    if tokenizer.eot_id is None:
        raise ConfigError("this tokenizer has no token that begins a document; give a --prompt to continue")
    return [tokenizer.eot_id]
