"""``megagpt serve``: a model behind OpenAI's completions API, and a page to try it on."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError
from megagpt.evaluate.source import open_source


@dataclass(frozen=True)
class ServeSettings:
    """Answer requests with a trained model: megagpt serve --from runs/gpt1 --port 8000

    With an API key, in the variable MEGAGPT_API_KEY or in a file, requests need it.
    """

    from_: str  # run folder, checkpoint folder, .safetensors file or folder in Hugging Face's form
    host: str = "127.0.0.1"  # address to listen at; any but this host's own is reached by others
    port: int = 8000  # 0 takes a free one
    name: str | None = None  # of the model, in requests; the folder's by default
    api_key_file: str | None = None  # a file with the key that requests need; without, the variable MEGAGPT_API_KEY
    batch_size: int = 8  # texts that are generated at once
    max_requests: int = 256  # texts that are generated or wait; more are refused with status 429
    max_prompt_tokens: int | None = None  # of a prompt; the model's context by default
    max_tokens: int = 2048  # that a request may ask for in an answer
    max_body_bytes: int = 1 << 20  # of a request
    grace: int = 30  # seconds for requests under way to finish after SIGTERM or Ctrl-C
    dtype: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic
    tokenizer: str | None = None  # a tokenizer.json; the run folder's by default

    def __post_init__(self) -> None:
        counts = ("batch_size", "max_requests", "max_prompt_tokens", "max_tokens", "max_body_bytes", "grace")
        for name, least in (("port", 0), *((name, 1) for name in counts)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} {value} must be at least {least}")
        if self.port > 65535:  # of which getaddrinfo would make another one
            raise ConfigError(f"--port {self.port} must be at most 65535; 0 takes a free one")


def serve_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt serve`` until it is told to stop. Raises a MegaGPTError for whatever the user can mend."""
    settings = parse_flags(ServeSettings, argv, prog="megagpt serve", aliases={"run": "from"})
    _check_installed()
    from megagpt.serve import guard, server
    from megagpt.serve.app import build_app

    key = guard.read_key(settings.api_key_file, os.environ)
    source = open_source(settings.from_, tokenizer=settings.tokenizer)
    tokenizer = source.tokenizer
    with server.bind(settings.host, settings.port) as bound:
        address, port = bound.getsockname()[:2]
        local = guard.is_loopback(address)
        if warning := open_to_others(address, port, key):
            _say(warning)
        source = source.settled()
        service = _service(settings, source, tokenizer, key, local)
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        running = server.make_server(
            build_app(service),
            most_connections=2 * settings.max_requests + 100,  # slow and idle ones beside those that are busy
            grace=settings.grace,
            give_up=lambda: service.worker.close(0),
        )
        bound.listen(server.BACKLOG)
        which = f"{service.name}, {source.checkpoint}," if source.checkpoint else service.name
        _say(f"{which} is served at {url}; Ctrl-C stops it")
        server.run(running, bound)
    _say("stopped")
    return 0


def open_to_others(address: str, port: int, key: bytes | None) -> str | None:
    """A warning where others may use the model and need no key."""
    from megagpt.serve import guard

    if key is not None or guard.is_loopback(address):
        return None
    return (
        f"warning: whoever reaches {address}, port {port}, may use this model: there is no API key; set "
        f"{guard.VARIABLE} or --api_key_file, or listen on this host alone: --host 127.0.0.1"
    )


def model_name(named: str) -> str:
    """The name of the folder that ``named`` is, or lies in where it is a file."""
    path = Path(named).resolve()
    return path.parent.name if path.is_file() else path.name


def _service(settings: ServeSettings, source, tokenizer, key: bytes | None, local: bool):
    from megagpt.model.generate import Generation
    from megagpt.serve.app import Service
    from megagpt.serve.request import Limits
    from megagpt.serve.worker import Worker

    context = source.config.seq_len
    generation = Generation(
        source.build(dtype=settings.dtype), max_texts=settings.batch_size, vocab_size=tokenizer.vocab_size
    )
    return Service(
        name=settings.name or model_name(settings.from_),
        tokenizer=tokenizer,
        worker=Worker(generation, settings.max_requests),
        limits=Limits(
            prompt_tokens=min(context, settings.max_prompt_tokens or context),
            max_tokens=settings.max_tokens,
            texts=settings.max_requests,
        ),
        key=key,
        local=local,
        body_bytes=settings.max_body_bytes,
    )


def _check_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"megagpt serve needs {error.name}: pip install 'megagpt[serve]'") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
