"""The thread that owns the model: texts of all requests are generated together, and join and leave between steps."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from megagpt.evaluate.text import Completion
from megagpt.model.generate import Generation

_log = logging.getLogger(__name__)


class Full(Exception):
    """As many texts as there may be are being generated or waiting."""


class Closed(Exception):
    """The worker stops, and takes no more."""


class Piece(NamedTuple):
    """What an answer has got; with ``finished`` ("stop" or "length") or ``failed`` it is the last one."""

    text: str
    finished: str | None = None
    failed: Exception | None = None


class Job:
    """A text to generate, and who is told about every piece of it."""

    def __init__(self, completion: Completion, deliver: Callable[[Piece], None]) -> None:
        self.completion, self.deliver = completion, deliver


class Worker:
    """Generates the texts of jobs in the order in which they came, as many at once as ``generation`` has rows.

    At most ``limit`` jobs are taken on. Pieces are handed over through ``call(function, argument)`` of :meth:`start`,
    once a step, so that whoever reads slowly delays nobody.
    """

    def __init__(self, generation: Generation, limit: int) -> None:
        self.limit = limit
        self._generation = generation
        self._waiting: deque[Job] = deque()
        self._running: dict = {}  # the generation's text: its job; changed by the thread alone
        self._gone: set[Job] = set()  # running jobs that nobody wants any more
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="megagpt-serve", daemon=True)
        self._call: Callable = lambda function, argument: function(argument)

    def start(self, call: Callable[[Callable, list], object] | None = None) -> None:
        """Begin; ``call`` says in which thread pieces are handed over, the worker's own by default."""
        self._call = call or self._call
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """Stop after the step under way, which is awaited so many seconds; what is left fails with :class:`Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether jobs are taken on."""
        return self._thread.is_alive() and not self._closed

    def submit(self, jobs: list[Job]) -> None:
        """Take on all of ``jobs``, or raise :class:`Full` or :class:`Closed` and take on none."""
        with self._changed:
            if not self.alive:
                raise Closed
            if len(self._waiting) + len(self._running) + len(jobs) > self.limit:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Nobody reads these any more: their places go to others. A job that has finished is no matter."""
        gone = set(jobs)
        with self._changed:
            self._waiting = deque(job for job in self._waiting if job not in gone)
            self._gone |= gone & set(self._running.values())

    def _run(self) -> None:
        try:
            while self._let_in():
                self._step()
        except Exception:  # a bug here must not leave clients waiting for ever
            _log.exception("the worker has failed")
        finally:
            with self._changed:
                self._closed = True
                left = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            self._deliver([(job, Piece("", failed=Closed())) for job in left])

    def _let_in(self) -> bool:
        """Wait until there is something to do; False when there will be nothing more."""
        with self._changed:
            while not (self._waiting or self._running or self._closed):
                self._changed.wait()
            if self._closed:
                return False
            for text in [text for text, job in self._running.items() if job in self._gone]:
                self._generation.leave(text)
                del self._running[text]
            self._gone.clear()
            while self._waiting and self._generation.room:
                job = self._waiting.popleft()
                self._running[job.completion.tokens] = job
                self._generation.join(job.completion.tokens)
        return True

    def _step(self) -> None:
        try:
            texts = self._generation.step()
        except Exception as error:  # out of memory, say: these texts are lost, and the next ones may do
            _log.exception("a step has failed")
            self._end([(job, Piece("", failed=error)) for job in self._running.values()])
            return
        self._end([(job, self._advance(job)) for job in [self._running[text] for text in texts]])

    def _advance(self, job: Job) -> Piece:
        try:
            return Piece(job.completion.advance(self._generation), job.completion.finished)
        except Exception as error:
            _log.exception("an answer has failed")
            return Piece("", failed=error)

    def _end(self, pieces: list[tuple[Job, Piece]]) -> None:
        """Hand over what has come; what was the last of its job gives its place to another."""
        with self._changed:
            for job, piece in pieces:
                if piece.finished or piece.failed:
                    del self._running[job.completion.tokens]
                    if job.completion.tokens in self._generation.texts:
                        self._generation.leave(job.completion.tokens)
        self._deliver([(job, piece) for job, piece in pieces if piece.text or piece.finished or piece.failed])

    def _deliver(self, pieces: list[tuple[Job, Piece]]) -> None:
        if not pieces:
            return
        try:
            self._call(_hand_over, pieces)
        except RuntimeError:  # the event loop that would hand them over has been closed
            _log.debug("nobody is left to take %d pieces", len(pieces))


def _hand_over(pieces: list[tuple[Job, Piece]]) -> None:
    for job, piece in pieces:
        job.deliver(piece)
