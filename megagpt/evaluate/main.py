"""``megagpt generate``: text from a trained model."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megagpt.config.flags import parse_flags
from megagpt.data.storage import check_writable, write_atomically
from megagpt.errors import ConfigError, DataError
from megagpt.evaluate.progress import Progress
from megagpt.evaluate.prompts import PRESETS, Preset, first_sentences, read_pairs, read_prompts, read_text
from megagpt.evaluate.source import Source, open_source

if TYPE_CHECKING:
    from megagpt.evaluate.text import Completion
    from megagpt.model.generate import Generation, Text
    from megagpt.model.sampling import Sampling

ALIASES = {"run": "from", "max_new_tokens": "max_tokens"}  # the latter as in transformers
_PLAIN = Preset(lambda text, context, examples: text, max_tokens=200, temperature=0.8)


@dataclass(frozen=True)
class GenerateSettings:
    """Continue a text with a trained model: megagpt generate --from runs/gpt1 --prompt 'It was a dark night'"""

    from_: str  # run folder, checkpoint folder, .safetensors file or folder in Hugging Face's form
    prompt: str = ""  # the text to continue; without one a new document begins
    prompts: str | None = None  # instead of one prompt: a file of JSON lines with a "prompt" each
    output: str | None = None  # where the answers to --prompts go: its lines with "text", "tokens" and "finish"
    interactive: bool = False  # ask for prompts, a line each, until an empty one

    preset: Literal["summary", "translation", "question"] | None = None  # put the prompt as GPT-2's paper does
    examples: str | None = None  # of translations or questions: a file of pairs, a tab between the two
    context: str | None = None  # of a question: a file with the text it is about

    max_tokens: int | None = None  # tokens to add, 200 unless the preset says; fewer when the model ends the document
    temperature: float | None = None  # 0.8 unless the preset says; 0 takes the likeliest token each time
    top_k: int | None = None  # draw from the k likeliest tokens; 0 from all
    top_p: float = 1.0  # draw from the likeliest tokens that have this share of the probability together
    top_p_rule: Literal["smallest", "reference"] = "smallest"  # the fewest that reach it, or the most within it
    repetition_penalty: float = 1.0  # above 1 makes what was there less likely
    stop: tuple[str, ...] = ()  # texts before which the answer ends
    num_samples: int = 1  # answers to a prompt
    seed: int = 1234  # of the first answer; each further one has the next seed

    batch_size: int = 8  # answers at once
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic
    no_cache: bool = False  # keep no keys and values: every token reads the whole text again
    tokenizer: str | None = None  # a tokenizer.json; the run folder's by default

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("num_samples", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} {value} must be at least {least}")
        if "" in self.stop:
            raise ConfigError("--stop holds an empty text, before which every answer ends at once")
        if (self.prompts is None) != (self.output is None):
            raise ConfigError("--prompts FILE and --output FILE go together")
        if (self.prompts is not None) + self.interactive + bool(self.prompt) > 1:
            raise ConfigError("--prompt, --prompts and --interactive all say what to continue; give one")
        for name, presets in (("examples", ("translation", "question")), ("context", ("question",))):
            if getattr(self, name) is not None and self.preset not in presets:
                raise ConfigError(f"--{name} is for --preset {' or '.join(presets)}")
        self.sampling(0)

    @property
    def chosen(self) -> Preset:
        return PRESETS[self.preset] if self.preset else _PLAIN

    def sampling(self, answer: int) -> "Sampling":
        """How the tokens of the answer number ``answer`` are chosen. Raises ConfigError."""
        from megagpt.model.sampling import Sampling

        try:
            return Sampling(
                temperature=self.chosen.temperature if self.temperature is None else self.temperature,
                top_k=self.chosen.top_k if self.top_k is None else self.top_k,
                top_p=self.top_p,
                top_p_rule=self.top_p_rule,
                repetition_penalty=self.repetition_penalty,
                seed=self.seed + answer,
            )
        except ConfigError as error:
            raise ConfigError(f"--{error}") from None


def generate_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt generate``. Raises a MegaGPTError for whatever the user can mend."""
    settings = parse_flags(GenerateSettings, argv, prog="megagpt generate", aliases=ALIASES)
    if settings.output is not None:
        check_writable(Path(settings.output))
    rows = read_prompts(settings.prompts) if settings.prompts is not None else None
    writer = _Writer(settings)
    if rows is not None:
        writer.to_file(rows)
    elif settings.interactive:
        writer.interact()
    else:
        writer.show(settings.prompt)
    return 0


class _Writer:
    """Answers prompts as the settings say."""

    def __init__(self, settings: GenerateSettings) -> None:
        self.settings, self.preset = settings, settings.chosen
        self.examples, self.context = read_pairs(settings.examples), read_text(settings.context)
        self.source: Source = open_source(settings.from_, tokenizer=settings.tokenizer)
        self.tokenizer = self.source.tokenizer
        self.model = None

    def show(self, prompt: str) -> None:
        """Print prompt and answers, token by token where there is one answer and all of it is kept."""
        texts = [self._text(prompt, i) for i in range(self.settings.num_samples)]
        begin = "" if self.settings.preset else prompt
        answers = self._answers(texts)  # which reads the weights: what is wrong with them does not follow the prompt
        if len(texts) == 1 and self.preset.sentences is None:
            print(begin, end="", flush=True)
            try:
                for _, piece in answers:
                    print(piece, end="", flush=True)
            finally:  # of Ctrl-C too: what the shell says next begins a line
                print(flush=True)
            return
        completions = {completion.tokens: completion for completion, _ in answers}
        for text in texts:
            print(begin + self._kept(completions[text]), flush=True)

    def interact(self) -> None:
        """A prompt a line; what is wrong with one is said, and the next is asked for."""
        while True:
            try:
                prompt = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if not prompt.strip():
                return
            try:
                self.show(prompt)
            except (ConfigError, DataError) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)

    def to_file(self, rows: list[dict]) -> None:
        """Answer every row, in order, into the output file, which appears when it is whole."""
        n = self.settings.num_samples
        texts = []
        for number, row in enumerate(rows, 1):
            try:
                texts += [self._text(row["prompt"], (number - 1) * n + i) for i in range(n)]
            except ConfigError as error:
                raise DataError(f"prompt {number} of {self.settings.prompts}: {error}") from None
        answers, told = {}, Progress(self.settings.output, len(texts), "answers")
        for completion, _ in self._answers(texts):
            if completion.finished:
                answers[completion.tokens] = completion
                told(len(answers))
        lines = [json.dumps({**rows[i // n], **self._answer(answers[text])}) for i, text in enumerate(texts)]
        write_atomically(Path(self.settings.output), "".join(f"{line}\n" for line in lines).encode())
        print(f"{len(lines):,} answer{'s' * (len(lines) != 1)} in {self.settings.output}")

    def _text(self, prompt: str, answer: int) -> "Text":
        """The tokens of a prompt, to be continued. Raises ConfigError for one that is longer than the context."""
        from megagpt.model.generate import Text, check_prompt

        put = self.preset.prompt(prompt, self.context, self.examples)
        ids = self.tokenizer.encode(put) or _first_token(self.tokenizer)
        check_prompt(len(ids), self.source.config.seq_len)
        return Text(
            ids,
            max_new_tokens=self.settings.max_tokens or self.preset.max_tokens,
            sampling=self.settings.sampling(answer),
            stop_ids=[] if self.tokenizer.eot_id is None else [self.tokenizer.eot_id],
        )

    def _answers(self, texts: "list[Text]") -> "Iterator[tuple[Completion, str]]":
        from megagpt.evaluate.text import Completion, complete

        stop = self.settings.stop or self.preset.stop
        return complete(self._generation(texts), [Completion(self.tokenizer, text, stop) for text in texts])

    def _generation(self, texts: "list[Text]") -> "Generation":
        from megagpt.model.generate import Generation

        if self.model is None:
            self.model = self.source.build(dtype=self.settings.dtype)
        longest = max(text.n_prompt + text.max_new_tokens for text in texts)
        n = min(len(texts), self.settings.batch_size)
        return Generation(
            self.model,
            max_texts=n,
            max_tokens=longest,
            vocab_size=self.tokenizer.vocab_size,
            cache=not self.settings.no_cache,
        )

    def _kept(self, completion: "Completion") -> str:
        n = self.preset.sentences
        return completion.text if n is None else first_sentences(completion.text, n)

    def _answer(self, completion: "Completion") -> dict:
        return {
            "text": self._kept(completion),
            "tokens": len(completion.tokens.new),
            "finish": completion.finished,
        }


def _first_token(tokenizer) -> list[int]:
    if tokenizer.eot_id is None:
        raise ConfigError("this tokenizer has no token that begins a document; give a --prompt to continue")
    return [tokenizer.eot_id]
