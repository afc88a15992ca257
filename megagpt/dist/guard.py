"""A thread beside the training that ends a rank which would wait for ever: hung, or left alone by its peers.

Whoever makes progress calls :func:`beat`. The thread counts its own waking hours and not the clock's, so a job that was
suspended as a whole is no hang when it goes on.
"""

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from megagpt.dist import memory
from megagpt.dist.presence import Ancestry, Presence

HUNG, LOST = 5, 4  # exit codes
# Before the first step come compilation and cold files; a save waits for a slow disk.
_PATIENT, _PATIENCE = ("setup", "save"), 1800.0  # seconds
_USUAL = ("step", "evaluation")
_TICK = 0.5  # seconds
_PEERS_GRACE = 5.0  # seconds in which a rank usually notices by itself that another one is gone
_ORPHAN_GRACE = 10.0  # ... and saves after its launcher has ended
_DUMP_GRACE = 2.0  # ... and in which ranks that hang together all get to show their stacks


class _Place:
    section = ""
    step = 0
    beats = 0


_place = _Place()


def beat(section: str | None = None, step: int | None = None) -> None:
    """Say that something has been achieved, and which section (setup, step, evaluation, save) of which step follows."""
    _place.beats += 1
    _place.section = section or _place.section
    _place.step = _place.step if step is None else step


def where() -> str:
    """Where in its run this rank is, as in " in step 7"; empty in a program that is no run."""
    if _place.section == "step" or not _place.step:
        return f" in {_place.section} {_place.step or ''}".rstrip() if _place.section else ""
    return f" in the {_place.section} {'of' if _place.section == 'setup' else 'after'} step {_place.step}"


class Guard(threading.Thread):
    """The thread; :func:`guarded` starts one."""

    def __init__(self, presence: Presence, env: Mapping[str, str], on_orphan: Callable[[], None]) -> None:
        super().__init__(name="guard", daemon=True)
        self._presence = presence
        self._ancestry = Ancestry(env)
        self._on_orphan = on_orphan
        self._env = env
        self.memory_kills = memory.kills()  # before this run
        self._limits: dict[str, float] = {}
        self._peers: set[int] = set()
        self._seen: set[int] = set()
        self._done = threading.Event()
        self._orphan_for = self._alone_for = self._idle_for = 0.0
        self._beats = -1

    def watch(self, hang_timeout: float | None, collective_timeout: float, local_world_size: int) -> None:
        """From here on progress is expected, and the other ranks of this host to live.

        ``hang_timeout`` are seconds for every section. None takes half an hour for setup and saves and elsewhere a
        little less than collectives may last: NCCL ends a process without a word about where it stands.
        """
        beat("setup", 0)
        usual, patient = hang_timeout or 0.9 * collective_timeout, hang_timeout or _PATIENCE
        self._limits = {**dict.fromkeys(_USUAL, usual), **dict.fromkeys(_PATIENT, patient)}
        self._peers = set(range(local_world_size)) - {self._presence.local_rank}
        self._seen = {peer for peer in self._peers if self._presence.sees(peer)}

    def run(self) -> None:
        woken = time.monotonic()
        while not self._done.wait(_TICK):
            now = time.monotonic()
            self._look(min(now - woken, 2 * _TICK))
            woken = now

    def _look(self, seconds: float) -> None:
        self._orphan_for = self._orphan_for + seconds if self._ancestry.is_orphan() else 0.0
        if self._orphan_for:
            self._on_orphan()
        if self._orphan_for > _ORPHAN_GRACE:
            self._end(LOST, "its launcher has ended")
        self._seen |= {peer for peer in self._peers if self._presence.sees(peer)}
        gone = [peer for peer in self._seen if not self._presence.sees(peer)]
        self._alone_for = self._alone_for + seconds if gone else 0.0
        if self._alone_for > _PEERS_GRACE:
            self._end(LOST, peer_ended())
        self._idle_for = self._idle_for + seconds if self._beats == _place.beats else 0.0
        self._beats = _place.beats
        limit = self._limits.get(_place.section)
        if limit is None:
            return
        # In case that this thread itself gets no turn: a page that never comes from a dead disk keeps Python's lock.
        faulthandler.dump_traceback_later(limit + 30, exit=True, file=2)
        if self._idle_for > limit:
            self._end(HUNG, f"nothing has moved for {limit:g} s{where()}; the stacks of its threads follow", dump=True)

    def _end(self, code: int, reason: str, dump: bool = False) -> None:
        # Nothing below may keep the process from ending: a full pipe behind stderr, a lock held by another thread.
        threading.Timer(_DUMP_GRACE + 1, os._exit, [code]).start()
        tell_code(code, self._env)
        os.write(2, f"{name(self._env)} stops: {reason}\n".encode())
        if dump:
            faulthandler.dump_traceback(file=2, all_threads=True)
            time.sleep(_DUMP_GRACE)
        os._exit(code)

    def close(self) -> None:
        self._done.set()
        self.join(1.0)
        faulthandler.cancel_dump_traceback_later()


def name(env: Mapping[str, str] = os.environ) -> str:
    """This rank and its host, as in "rank 3 on node7"."""
    return f"rank {env.get('RANK') or env.get('SLURM_PROCID') or '0'} on {socket.gethostname()}"


def tell_code(code: int, env: Mapping[str, str] = os.environ) -> None:
    """Write an exit code other than 0 where MEGAGPT_EXIT_FILE says, if no process of the job has done so before.

    srun tells the highest code of all ranks, and those that a failed one leaves behind end with others.
    """
    if code and env.get("MEGAGPT_EXIT_FILE"):
        with suppress(OSError), open(env["MEGAGPT_EXIT_FILE"], "x", encoding="ascii") as file:
            file.write(str(code))


def has_failed(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a process of this job has told its failure there."""
    return os.path.exists(env.get("MEGAGPT_EXIT_FILE", ""))


_guards: list[Guard] = []


@contextmanager
def guarded(
    presence: Presence, env: Mapping[str, str] = os.environ, on_orphan: Callable[[], None] = lambda: None
) -> Iterator[Guard]:
    """Inside, this rank does not outlive its launcher: it calls ``on_orphan`` and soon afterwards ends."""
    guard = Guard(presence, env, on_orphan)
    _guards.append(guard)
    guard.start()
    try:
        yield guard
    finally:
        _guards.remove(guard)
        guard.close()


def peer_ended() -> str:
    """What a rank has to say that has lost a peer: one that the kernel has killed has said nothing itself."""
    text = "another rank has ended; its own output says why"
    if any(memory.killed_since(guard.memory_kills) for guard in _guards):
        text += ", unless the kernel killed it: it has killed a process of this host for want of memory"
    return text


def watch(hang_timeout: float | None, collective_timeout: float, local_world_size: int) -> None:
    """:meth:`Guard.watch` of this process's guard, if it has one."""
    for guard in _guards:
        guard.watch(hang_timeout, collective_timeout, local_world_size)
