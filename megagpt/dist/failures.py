"""One message whatever the number of ranks, and the exit code that goes with it."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TypeVar

from megagpt import errors
from megagpt.dist import guard, memory
from megagpt.dist.gather import gather_json
from megagpt.dist.presence import Presence
from megagpt.dist.world import is_main
from megagpt.errors import MegaGPTError, Stopped, StorageError
from megagpt.secrets import hide

Result = TypeVar("Result")

_GRACE = 3.0  # seconds within which the ranks of a host fail of a common cause
_INTERRUPTED = 130  # as a shell reports Ctrl-C
_LOST_WORDS = ("closed by peer", "reset by peer", "Broken pipe")  # of gloo, behind the place in its own source
_LATE_WORDS = ("Timed out", "timed out", "timeout", "Timeout")


def run_main(
    fn: Callable[[], int | None],
    env: Mapping[str, str] = os.environ,
    on_orphan: Callable[[], None] | None = None,
) -> int:
    """Run ``fn`` as this process's program and return its exit code: ``fn``'s own, or that of the error it raised.

    A MegaGPTError is shown as one line, once: by rank 0, or with its name by a rank that fails alone. A rank whose peer
    has ended says so in a line: the reason is with the peer. Anything else is a bug and shows its traceback, with the
    rank's name and the step. Where MEGAGPT_EXIT_FILE names a file, the first process to fail writes its code there.
    With ``on_orphan`` this rank doesn't outlive its launcher (:mod:`megagpt.dist.guard`).
    """
    code = _run(fn, env, on_orphan)
    guard.tell_code(code, env)
    return code


def _run(fn: Callable[[], int | None], env: Mapping[str, str], on_orphan: Callable[[], None] | None) -> int:
    guarded = (lambda *_: nullcontext()) if on_orphan is None else guard.guarded
    with Presence(env) as presence, guarded(presence, env, on_orphan):
        try:
            return fn() or 0
        except Stopped as stop:
            return stop.exit_code
        except MegaGPTError as error:
            _show(error, env, presence)
            return error.exit_code
        except PermissionError as error:  # of a file or folder of somebody else's, wherever it was met
            refused = error.filename or error
            denied = StorageError(f"no permission for {refused}; ask who owns it, or name another place")
            _show(denied, env, presence)
            return denied.exit_code
        except KeyboardInterrupt:
            return _INTERRUPTED
        except SystemExit as stop:  # --help has answered
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception as error:
            sys.stdout.flush()
            if _lost_a_peer(error):
                return _say(env, f"stops: {guard.peer_ended()}", guard.LOST)
            if _waited_in_vain(error):
                told = f"stops{guard.where()}: another rank has not answered in time\n{traceback.format_exc()}"
                return _say(env, told, guard.HUNG)
            way_out = memory.WAYS_OUT if memory.was_refused(error) else ""
            return _say(env, f"failed{guard.where()}:\n{traceback.format_exc()}{way_out}", 1)


def _say(env: Mapping[str, str], text: str, code: int) -> int:
    print(hide(f"{guard.name(env)} {text}", env), file=sys.stderr, flush=True)
    return code


def everywhere(fn: Callable[[], Result]) -> Result:
    """Run ``fn`` on every rank; when it fails on any, raise on every rank the error of the lowest that failed.

    The process group exists and every rank calls this. Ranks return their own results.
    """
    failure = result = None
    try:
        result = fn()
    except Exception as error:
        failure = error
    report = None
    if failure is not None:
        kind = type(failure).__name__ if isinstance(failure, MegaGPTError) else None
        report = {"kind": kind, "text": str(failure) if kind else f"{type(failure).__name__}: {failure}"}
    reports = gather_json(report)
    failed = {rank: report for rank, report in enumerate(reports) if report is not None}
    if not failed:
        return result
    if failure is not None and not isinstance(failure, MegaGPTError):
        raise failure  # a bug: its traceback is on the rank that has it
    rank, first = next(iter(failed.items()))
    # Rank 0 does alone what only one can do, such as writing a file; it needs no name.
    prefix = "" if rank == 0 or len(failed) == len(reports) else f"rank {rank}: "
    error = getattr(errors, first["kind"] or "", MegaGPTError)(prefix + first["text"])
    error.on_every_rank = True
    raise error from failure


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective over gloo failed because another rank is gone."""
    text = str(error)
    return isinstance(error, RuntimeError) and "gloo" in text and any(words in text for words in _LOST_WORDS)


def _waited_in_vain(error: Exception) -> bool:
    """Whether a collective failed because its time was up."""
    text = str(error)
    ours = "gloo" in text or type(error).__name__.startswith("Dist")
    return isinstance(error, RuntimeError) and ours and any(words in text for words in _LATE_WORDS)


def _show(error: MegaGPTError, env: Mapping[str, str], presence: Presence) -> None:
    prefix = ""
    if not is_main(env):
        if getattr(error, "on_every_rank", False) or _leader_is_gone(presence, env):
            return
        prefix = f"{guard.name(env)}: "
    sys.stdout.flush()
    print(hide(f"{prefix}error: {error}", env), file=sys.stderr, flush=True)


def _leader_is_gone(presence: Presence, env: Mapping[str, str]) -> bool:
    """True as soon as this host's first rank has ended, or any host's has told its failure; False when it goes on.

    A flag with a slip in it fails on every rank at once, and then the first rank's message is enough; a rank that fails
    while the first one goes on has to speak for itself.
    """
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline:
        if guard.has_failed(env):
            return True
        # The launcher may end this process meanwhile, if the failure is common to all hosts.
        if presence.local_rank and not presence.sees(0):
            return True
        time.sleep(0.05)
    return False
