"""One message whatever the number of ranks, and the exit code that goes with it."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

from megagpt import errors
from megagpt.dist.gather import gather_json
from megagpt.dist.world import is_main
from megagpt.errors import MegaGPTError, Stopped

Result = TypeVar("Result")

_GRACE = 3.0  # seconds within which the ranks of a host fail of a common cause
_INTERRUPTED = 130  # as a shell reports Ctrl-C
_LOST = 4
_LOST_WORDS = ("closed by peer", "reset by peer", "Broken pipe")  # of gloo, behind the place in its own source


def run_main(fn: Callable[[], int | None], env: Mapping[str, str] = os.environ) -> int:
    """Run ``fn`` as this process's program and return its exit code: ``fn``'s own, or that of the error it raised.

    A MegaGPTError is shown as one line, once: by rank 0, or with its name by a rank that fails alone. A rank whose peer
    has ended says so in a line: the reason is with the peer. Anything else is a bug and shows its traceback, with the
    rank's name. Where MEGAGPT_EXIT_FILE names a file, the first process to fail writes its code there.
    """
    code = _run(fn, env)
    if code and env.get("MEGAGPT_EXIT_FILE"):
        # srun tells the highest code of all ranks, and those that a failed one leaves behind end with others.
        with suppress(OSError), open(env["MEGAGPT_EXIT_FILE"], "x", encoding="ascii") as file:
            file.write(str(code))
    return code


def _run(fn: Callable[[], int | None], env: Mapping[str, str]) -> int:
    with _presence(env) as leader_is_gone:
        try:
            return fn() or 0
        except Stopped as stop:
            return stop.exit_code
        except MegaGPTError as error:
            _show(error, env, leader_is_gone)
            return error.exit_code
        except KeyboardInterrupt:
            return _INTERRUPTED
        except SystemExit as stop:  # --help has answered
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception as error:
            sys.stdout.flush()
            if _lost_a_peer(error):
                print(f"{_name(env)} stops: another rank has ended; its own output says why", file=sys.stderr, flush=True)
                return _LOST
            print(f"{_name(env)} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return 1


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


def _show(error: MegaGPTError, env: Mapping[str, str], leader_is_gone: Callable[[], bool]) -> None:
    prefix = ""
    if not is_main(env):
        if getattr(error, "on_every_rank", False) or leader_is_gone():
            return
        prefix = f"{_name(env)}: "
    sys.stdout.flush()
    print(f"{prefix}error: {error}", file=sys.stderr, flush=True)


def _name(env: Mapping[str, str]) -> str:
    rank = env.get("RANK") or env.get("SLURM_PROCID") or "0"
    return f"rank {rank} on {socket.gethostname()}"


@contextmanager
def _presence(env: Mapping[str, str]):
    """Lets the ranks of a host see whether their first one still lives; gives a function that asks.

    A flag with a slip in it fails on every rank at once, and then the first rank's message is enough; a rank that fails
    while the first one goes on has to speak for itself. The sign of life is a socket in Linux's abstract namespace,
    which leaves no file behind and vanishes with its process however that ends.
    """
    local_rank = env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or "0"
    meeting = env.get("MASTER_PORT") or env.get("SLURM_JOB_ID") or ""
    name = f"\0megagpt-{os.getuid()}-{env.get('MASTER_ADDR', '')}-{meeting}-{env.get('SLURM_STEP_ID', '')}"

    def leader_is_gone() -> bool:
        """True as soon as this host's first rank has ended, or any host's has told its failure; False when it goes on."""
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            if os.path.exists(env.get("MEGAGPT_EXIT_FILE", "")):
                return True
            if local_rank == "0":  # the launcher may end this process meanwhile, if the failure is common to all hosts
                time.sleep(0.05)
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(name)
                except OSError:
                    return True
            time.sleep(0.05)
        return False

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sign:
        if local_rank == "0" and meeting:
            with suppress(OSError):  # the name is in use by another job on the same port, which cannot run anyway
                sign.bind(name)
        yield leader_is_gone
