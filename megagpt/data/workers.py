"""Work for several processes, results in the order of the tasks, and a bounded number of both in memory.

Processes are spawned, never forked: a tokenizer's threads do not survive a fork. Each talks over a pipe of its own,
so it ends when this process does, however that ends.
"""

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from megagpt import errors
from megagpt.errors import MegaGPTError

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may run on, which on a shared machine are fewer than it has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """``n`` processes that each make a function with ``make(argument)`` and apply it to tasks.

    With ``n`` = 0 the work is done in this process. To be used in a ``with`` statement. What a process raises is
    raised by ``map``; a process that is killed is a MegaGPTError.
    """

    def __init__(self, n: int, make: Callable, argument) -> None:
        self._function = make(argument) if n == 0 else None
        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        self._processes = []
        self._threads = ThreadPoolExecutor(max(n, 1), thread_name_prefix="worker")
        context = multiprocessing.get_context("spawn")
        for _ in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, argument), daemon=True)
            process.start()
            theirs.close()
            self._processes.append((process, ours))
            self._idle.put(ours)

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Each task with its result, in the order of ``tasks``, of which only as many are drawn as can be worked on."""
        if self._function:
            for task in tasks:
                yield task, self._function(task)
            return
        pending: deque[tuple[Task, Future]] = deque()
        for task in tasks:
            pending.append((task, self._threads.submit(self._exchange, task)))
            while pending and (len(pending) > 3 * len(self._processes) or pending[0][1].done()):
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()

    def _exchange(self, task: Task) -> Result:
        connection = self._idle.get()
        try:
            connection.send(task)
            failure, result = connection.recv()
        except (EOFError, OSError):
            raise MegaGPTError(
                "a worker process was killed, most likely because memory ran out; run the same command with fewer "
                "--workers and it goes on where it stopped"
            ) from None
        finally:
            self._idle.put(connection)
        if failure is not None:
            raise getattr(errors, failure, RuntimeError)(result)
        return result

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process, connection in self._processes:
            process.terminate()
            connection.close()
        for process, _ in self._processes:
            process.join()


def _serve(connection, make: Callable, argument) -> None:
    """The life of a worker: tasks in, results out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent tells us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    function = None
    try:
        while True:
            task = connection.recv()
            try:
                function = function or make(argument)
                reply = (None, function(task))
            except Exception as error:
                reply = (type(error).__name__, str(error))
            connection.send(reply)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
