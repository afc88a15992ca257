"""The sockets: uvicorn, made patient with slow clients for a while only, and stopped gracefully by a signal."""

import asyncio
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megagpt.errors import ConfigError

BACKLOG = 1024
_TO_SAY_SO = 5  # seconds for the clients of requests that were ended to read that


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit to how long a client may take for a request's head, and for reading what it asked for.

    A client that exceeds one is cut off; the application sees that it has hung up.
    """

    head_seconds = 10.0  # from the first byte of a head, or the connection, to its last
    read_seconds = 60.0  # without a byte taken while the socket's buffers are full

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._stalled = None
        self._slow_head = self.loop.call_later(self.head_seconds, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:  # the head is complete
            self._slow_head = _cancelled(self._slow_head)
        elif self._slow_head is None and not self.transport.is_closing():
            self._slow_head = self.loop.call_later(self.head_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancelled(self._stalled)
        self._stalled = self.loop.call_later(self.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stalled = _cancelled(self._stalled)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._slow_head, self._stalled = _cancelled(self._slow_head), _cancelled(self._stalled)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port which is taken is said before a model is read. Raises ConfigError."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, proto)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot listen at {host}, port {port}: {reason}; choose others: --host, --port") from None
    return bound


class Server(uvicorn.Server):
    """Asked to stop, it lets requests finish for ``grace`` seconds, then calls ``give_up``, which has to end them.

    Asked again, it does so at once.
    """

    def __init__(self, config: uvicorn.Config, grace: float, give_up: Callable[[], None]) -> None:
        super().__init__(config)
        self._grace, self._give_up = grace, give_up

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        patience = asyncio.ensure_future(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            patience.cancel()
        if self.force_exit:  # uvicorn leaves this out then, and the application's end would be a traceback
            await self.lifespan.shutdown()

    async def _end_requests(self) -> None:
        clock = asyncio.get_running_loop().time
        end = clock() + self._grace
        while clock() < end and not self.force_exit:
            await asyncio.sleep(0.1)
        self._give_up()


def make_server(app, *, most_connections: int, grace: int, give_up: Callable[[], None]) -> Server:
    """A :class:`Server` of ``app`` with at most so many connections at once."""
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=most_connections,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=grace + _TO_SAY_SO,
        backlog=BACKLOG,
    )
    return Server(config, grace, give_up)


def run(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; the second one does not wait for requests."""

    def stop(*_) -> None:
        server.should_exit = True

    with _handling(stop):  # before uvicorn's own handlers and after them: it raises what it has caught once more
        server.run(sockets=[bound])


@contextmanager
def _handling(handler):
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
