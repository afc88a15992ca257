"""The answers to one request, as they come from the worker's thread into the event loop."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial

from megagpt.evaluate.text import Completion
from megagpt.serve.errors import ApiError
from megagpt.serve.worker import Closed, Full, Job, Piece, Worker


class Answers:
    """Completions, ``n`` to a prompt, that the worker has taken on; :meth:`close` gives their places back.

    Raises ApiError: 429 where there is no room, 503 where the server stops.
    """

    def __init__(self, worker: Worker, completions: list[Completion], n: int = 1) -> None:
        self._worker, self._n = worker, n
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._jobs = [Job(completion, partial(self._take, i)) for i, completion in enumerate(completions)]
        try:
            worker.submit(self._jobs)
        except Full:
            said = f"{worker.limit:,} texts are being generated or waiting; try again later"
            raise ApiError(429, said, code="server_full", headers={"Retry-After": "1"}) from None
        except Closed:
            raise stopping() from None

    @property
    def usage(self) -> dict:
        """Tokens so far, in OpenAI's words; a prompt counts once, however many answers it has."""
        texts = [job.completion.tokens for job in self._jobs]
        prompt, new = sum(text.n_prompt for text in texts[:: self._n]), sum(len(text.new) for text in texts)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece with the number of its answer, until all have finished. Raises ApiError when one fails."""
        left = len(self._jobs)
        while left:
            i, piece = await self._pieces.get()
            if isinstance(piece.failed, Closed):
                raise stopping()
            if piece.failed:
                raise ApiError(500, "the server could not generate this text; its log says why")
            left -= piece.finished is not None
            yield i, piece

    def close(self) -> None:
        """Nobody waits for these any more."""
        self._worker.cancel(self._jobs)

    def _take(self, i: int, piece: Piece) -> None:
        self._pieces.put_nowait((i, piece))


def stopping() -> ApiError:
    """What is said where the worker takes on no more."""
    return ApiError(503, "the server is stopping", code="server_stopping")
