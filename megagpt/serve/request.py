"""The body of a request to ``/v1/completions``: what it may say, and the texts that it asks for.

Fields, defaults and meanings are those of OpenAI's completions; ``top_k``, ``top_p_rule`` and ``repetition_penalty``
are ours. What is not offered is refused unless its value asks for nothing.
"""

import json
import secrets
from dataclasses import dataclass

from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import ConfigError
from megagpt.evaluate.text import Completion
from megagpt.model.generate import Text
from megagpt.model.sampling import Sampling
from megagpt.serve.errors import bad

Prompt = str | list[int]

# What asks for nothing, of fields that are not offered.
_NOTHING = {"logprobs": (), "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,)}
_KNOWN = {
    *("model", "prompt", "max_tokens", "n", "best_of", "stop", "echo", "stream", "stream_options", "seed", "user"),
    *("temperature", "top_p", "top_k", "top_p_rule", "repetition_penalty"),
    *_NOTHING,
}
_LARGEST = 1e30  # of a number that is no count
_MOST_STOPS = 4
_MOST_ANSWERS = 128  # of one prompt


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    prompt_tokens: int  # of one prompt, at most the model's context
    max_tokens: int  # of one answer
    texts: int  # prompts times answers


@dataclass(frozen=True)
class CompletionRequest:
    """A body that has been read; ``prompts`` are texts or tokens."""

    model: str | None
    prompts: list[Prompt]
    max_tokens: int
    n: int  # answers to each prompt
    stop: tuple[str, ...]
    samplings: list[Sampling]  # of the answers: n for each prompt, in order
    echo: bool
    stream: bool
    usage: bool  # a last piece of the stream that counts tokens


def read_request(content: bytes, limits: Limits) -> CompletionRequest:
    """The request in a body of JSON. Raises ApiError with status 400."""
    body = _read_json(content)
    prompts, n = _prompts(body.get("prompt")), _integer(body, "n", 1, least=1, most=_MOST_ANSWERS)
    if len(prompts) * n > limits.texts:
        raise bad(f"{len(prompts):,} prompts with {n} answers each; the server takes {limits.texts:,} at once", "n")
    if _integer(body, "best_of", n) != n:
        raise bad("best_of is not offered; ask for n answers", "best_of")
    stream = _boolean(body, "stream")
    return CompletionRequest(
        model=_text(body, "model"),
        prompts=prompts,
        max_tokens=_integer(body, "max_tokens", 16, least=1, most=limits.max_tokens),
        n=n,
        stop=_stops(body.get("stop")),
        samplings=_samplings(body, len(prompts) * n),
        echo=_boolean(body, "echo"),
        stream=stream,
        usage=stream and _wants_usage(body.get("stream_options")),
    )


def completions(request: CompletionRequest, tokenizer: Tokenizer, limits: Limits) -> list[Completion]:
    """The texts to generate, ``n`` for each prompt, one prompt after the other. Raises ApiError with status 400."""
    stop_ids = [] if tokenizer.eot_id is None else [tokenizer.eot_id]
    found = []
    for i, prompt in enumerate(request.prompts):
        ids = _ids(prompt, tokenizer)
        if len(ids) > limits.prompt_tokens:
            raise bad(
                f"the prompt has {len(ids):,} tokens and the server takes {limits.prompt_tokens:,}; shorten it",
                "prompt",
                "context_length_exceeded",
            )
        for sampling in request.samplings[i * request.n : (i + 1) * request.n]:
            text = Text(ids, max_new_tokens=request.max_tokens, sampling=sampling, stop_ids=stop_ids)
            found.append(Completion(tokenizer, text, request.stop))
    return found


def echoed(request: CompletionRequest, tokenizer: Tokenizer) -> list[str]:
    """What stands before each answer: its prompt if that was asked for."""
    if not request.echo:
        return [""] * len(request.samplings)
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in request.prompts]
    return [text for text in texts for _ in range(request.n)]


def _read_json(content: bytes) -> dict:
    def refuse(word: str):
        raise ValueError(f"{word} is no number of JSON's")

    try:
        body = json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise bad(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise bad("the body is no JSON object")
    for name, value in body.items():
        if name not in _KNOWN:
            raise bad(f"unknown field {name[:80]!r}", name[:80])
        if name in _NOTHING and value is not None and value not in _NOTHING[name]:
            raise bad(f"{name} is not offered", name)
    return {name: value for name, value in body.items() if value is not None}


def _prompts(prompt) -> list[Prompt]:
    """A text, tokens, or a list of either."""
    if prompt is None:
        return [""]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(map(_is_integer, prompt))):
        prompt = [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(text, str) for text in prompt):
            for text in prompt:
                if not _is_unicode(text):
                    raise bad("the prompt holds half of a surrogate pair", "prompt")
            return prompt
        if all(isinstance(ids, list) and ids and all(map(_is_integer, ids)) for ids in prompt):
            return prompt
    raise bad("prompt must be a text, a list of tokens, or a list of either, and hold at least one", "prompt")


def _ids(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        if not ids and tokenizer.eot_id is None:
            raise bad("this model has no token that begins a document; give a prompt to continue", "prompt")
        return ids or [tokenizer.eot_id]
    if not all(0 <= token < tokenizer.vocab_size for token in prompt):
        raise bad(f"a token of the prompt is not among the model's {tokenizer.vocab_size:,}", "prompt")
    return prompt


def _samplings(body: dict, n: int) -> list[Sampling]:
    """One an answer, of the seeds ``seed``, ``seed`` + 1, ...; without one, of seeds that nobody knows."""
    seed = _integer(body, "seed", None)
    options = {
        "temperature": _number(body, "temperature"),
        "top_p": _number(body, "top_p"),
        # Far beyond, logits are no longer finite, and the texts beside this one would suffer.
        "repetition_penalty": _number(body, "repetition_penalty", least=0.1, most=10.0),
        "top_k": _integer(body, "top_k", 0),
        "top_p_rule": _text(body, "top_p_rule") or "smallest",
    }
    try:
        return [Sampling(**options, seed=secrets.randbits(62) if seed is None else seed + i) for i in range(n)]
    except ConfigError as error:
        raise bad(str(error), str(error).split()[0]) from None


def _stops(stop) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops) or len(stops) > _MOST_STOPS:
        raise bad(f"stop must be a text or a list of at most {_MOST_STOPS}", "stop")
    if "" in stops:
        raise bad("stop holds an empty text, before which every answer ends at once", "stop")
    return tuple(stops)


def _wants_usage(options) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise bad('stream_options must be an object with true or false under "include_usage"', "stream_options")
    return options.get("include_usage", False)


def _integer(body: dict, name: str, default, *, least: int | None = None, most: int | None = None):
    value = body.get(name, default)
    if value is not default and not _is_integer(value):
        raise bad(f"{name} must be a whole number", name)
    if (least is not None and value < least) or (most is not None and value > most):
        raise bad(f"{name} must be from {least} to {most:,}", name)
    return value


def _number(body: dict, name: str, *, least: float | None = None, most: float | None = None) -> float:
    value = body.get(name, 1.0)
    if not (_is_integer(value) or isinstance(value, float)) or abs(value) > _LARGEST:
        raise bad(f"{name} must be a number", name)
    if least is not None and not least <= value <= most:
        raise bad(f"{name} must be from {least:g} to {most:g}", name)
    return float(value)


def _boolean(body: dict, name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise bad(f"{name} must be true or false", name)
    return value


def _text(body: dict, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise bad(f"{name} must be a text", name)
    return value


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
