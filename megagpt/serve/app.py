"""The routes: OpenAI's ``/v1/completions`` and ``/v1/models``, ``/health``, and a page to try the model on."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from megagpt.data.tokenizer import Tokenizer
from megagpt.serve.answers import Answers, stopping
from megagpt.serve.errors import ApiError, bad
from megagpt.serve.guard import HostCheck, check_key
from megagpt.serve.request import CompletionRequest, Limits, completions, echoed, read_request
from megagpt.serve.worker import Worker

_STATIC = Path(__file__).parent / "static"
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Service:
    """What is served, and under which conditions."""

    name: str  # of the model, in requests
    tokenizer: Tokenizer
    worker: Worker  # not yet started: it lives as long as the application
    limits: Limits
    key: bytes | None = None  # SHA-256 of the API key
    local: bool = True  # only names of this host are answered to
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0  # in which a body has to arrive


def build_app(service: Service) -> Starlette:
    """The ASGI application; its lifespan starts and closes the worker."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start(asyncio.get_running_loop().call_soon_threadsafe)
        try:
            yield
        finally:
            await run_in_threadpool(service.worker.close)

    created = int(time.time())
    api = _Api(service, created)
    return Starlette(
        routes=[
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.model, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            *(Route(path, partial(_file, *file), methods=["GET"]) for path, file in _FILES.items()),
        ],
        middleware=[Middleware(HostCheck, refuse=_refusal)] if service.local else [],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_bug},
        lifespan=lifespan,
    )


class _Json(JSONResponse):
    """In ASCII: what a client has sent and is told again may be no Unicode."""

    def render(self, content) -> bytes:
        return json.dumps(content).encode("ascii")


class _Api:
    def __init__(self, service: Service, created: int) -> None:
        self.service = service
        self._model = {"id": service.name, "object": "model", "created": created, "owned_by": "megagpt"}

    async def completions(self, request: Request) -> Response:
        service = self.service
        check_key(request.headers, service.key)
        content = await _read_body(request, service.body_bytes, service.body_seconds)
        asked = read_request(content, service.limits)
        self._check_model(asked.model)
        # A long text takes its time to cut into tokens, and other requests go on meanwhile.
        texts = await run_in_threadpool(completions, asked, service.tokenizer, service.limits)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        head["model"] = service.name
        before = echoed(asked, service.tokenizer)
        answers = Answers(service.worker, texts, asked.n)
        if asked.stream:
            return _EventStream(answers, _events(asked, head, before, answers))
        try:
            return await _unless_gone(request, _whole(head, before, answers))
        finally:
            answers.close()

    async def models(self, request: Request) -> Response:
        check_key(request.headers, self.service.key)
        return _Json({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        check_key(request.headers, self.service.key)
        self._check_model(request.path_params["name"])
        return _Json(self._model)

    async def health(self, request: Request) -> Response:
        if not self.service.worker.alive:  # it stops, or a bug has ended its thread
            raise stopping()
        return _Json({"status": "ok"})

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.service.name):
            said = f"the model {name[:80]!r} does not exist; this server has {self.service.name!r}"
            raise ApiError(404, said, param="model", code="model_not_found")


class _EventStream(StreamingResponse):
    """Server-sent events; however they end, the places of the answers are given back."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a proxy in front must not collect them
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _events(asked: CompletionRequest, head: dict, before: list[str], answers: Answers) -> AsyncIterator[str]:
    def event(choices: list[dict]) -> str:
        chunk = {**head, "choices": choices}
        if asked.usage:
            chunk["usage"] = None if choices else answers.usage
        return f"data: {json.dumps(chunk)}\n\n"

    for i, text in enumerate(before):
        if text:
            yield event([_choice(i, text, None)])
    try:
        async for i, piece in answers.pieces():
            yield event([_choice(i, piece.text, piece.finished)])
    except ApiError as error:  # the status has been sent
        yield f"data: {json.dumps(error.body)}\n\n"
        return
    if asked.usage:
        yield event([])
    yield "data: [DONE]\n\n"


async def _whole(head: dict, before: list[str], answers: Answers) -> Response:
    texts, finished = [[text] for text in before], {}
    async for i, piece in answers.pieces():
        texts[i].append(piece.text)
        finished[i] = piece.finished
    choices = [_choice(i, "".join(text), finished[i]) for i, text in enumerate(texts)]
    return _Json({**head, "choices": choices, "usage": answers.usage})


def _choice(index: int, text: str, finished: str | None) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finished}


async def _unless_gone(request: Request, answer) -> Response:
    """What ``answer`` returns, or nothing in particular once the client has hung up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, hung_up = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=499)
    finally:
        work.cancel()
        hung_up.cancel()


async def _read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body. Raises ApiError: 415 unless it is called JSON, 413 where it is too long, 408 where it is too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Without a type, or as text, pages of strangers may send what they like from the user's browser.
        raise ApiError(415, "send the body with Content-Type: application/json")
    too_long = ApiError(413, f"the body is longer than {most:,} bytes", headers={"Connection": "close"})
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise too_long

    async def read() -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise too_long
        return bytes(content)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        said = f"the body has not arrived within {seconds:g} seconds"
        raise ApiError(408, said, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise bad("the body has not arrived") from None


async def _file(name: str, kind: str, request: Request) -> Response:
    return Response((_STATIC / name).read_bytes(), media_type=kind, headers=_PAGE_HEADERS)


def _refusal(error: ApiError) -> Response:
    return _Json(error.body, error.status, headers=error.headers)


async def _on_api_error(request: Request, error: ApiError) -> Response:
    return _refusal(error)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    path = request.url.path[:80]
    said = {
        404: f"{path} does not exist; there are /v1/completions, /v1/models and /health",
        405: f"{request.method} is not for {path}",
    }
    message = said.get(error.status_code, error.detail)
    return _refusal(ApiError(error.status_code, message, headers=error.headers))


async def _on_bug(request: Request, error: Exception) -> Response:
    return _refusal(ApiError(500, "the server has failed; its log says why"))
