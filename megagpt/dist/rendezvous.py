"""How ranks meet: they find rank 0's store, see that they belong together, and know who is missing.

A store is open to whoever knows its port. Before anything else is written to it, a rank compares the run it belongs to
with rank 0's: a job that was given another one's port says so and leaves, and the other one does not notice.
"""

import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from megagpt.dist.guard import name
from megagpt.dist.world import World
from megagpt.errors import ConfigError, PeerError, Stopped

_UNREACHABLE = 20.0  # seconds after which an address that never answers is given up
_POLL = 0.1
_RUN, _VERDICT = "megagpt/run", "megagpt/verdict"
Asked = Callable[[], str]


def meet(
    world: World,
    run_dir: str,
    seconds: float,
    env: Mapping[str, str] = os.environ,
    asked: Asked = lambda: "",
):
    """A torch store that all ranks of this run have come to within ``seconds``.

    None for a single rank, and under torchrun, whose agents have met and brought a store of their own. ``asked`` tells
    why this rank is to stop, or nothing: then no rank waits any longer, unless all have met already.

    Raises ConfigError for an address, a port or ranks that cannot be right, PeerError where ranks don't come, Stopped.
    """
    check_slurm(world, env)
    if world.world_size == 1 or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    try:
        if world.rank:
            _reach(world, seconds, asked)
        store = _open(world, seconds, asked)
    except Stopped as stop:
        print(f"{name()} stops: {stop}", flush=True)
        raise
    _greet(store, world, run_id(world, run_dir, env), time.monotonic() + seconds, seconds, asked)
    return store


def _wait(asked: Asked) -> None:
    """A moment; raises Stopped where this rank is asked to stop."""
    if reason := asked():
        raise Stopped(f"{reason}, before all ranks had met")
    time.sleep(_POLL)


def check_slurm(world: World, env: Mapping[str, str]) -> None:
    """Raise ConfigError where exported variables contradict the tasks that srun started."""
    tasks, task = env.get("SLURM_STEP_NUM_TASKS", ""), env.get("SLURM_PROCID", "")
    if not (tasks.isdigit() and task.isdigit()) or int(tasks) == 1 or "CROSS_SIZE" in env or "GROUP_RANK" in env:
        return  # alone in its step, or one of those that a launcher in a task has started
    if world.world_size != int(tasks):
        raise ConfigError(
            f"WORLD_SIZE is {world.world_size} and srun started {tasks} tasks; leave RANK and WORLD_SIZE to srun, "
            "or start as many tasks (--ntasks)"
        )


def run_id(world: World, run_dir: str, env: Mapping[str, str] = os.environ) -> str:
    """The same on all ranks of a run, and another one for another run, as far as that can be known."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MEGAGPT_LAUNCHER_PID")
    parts = [run_dir, world.world_size, *(env.get(name, "") for name in names)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _reach(world: World, seconds: float, asked: Asked) -> None:
    """Wait until somebody listens at rank 0's address."""
    place = f"MASTER_ADDR={world.master_addr}"
    try:
        addresses = socket.getaddrinfo(world.master_addr, world.master_port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{place} is the name of no host here ({reason}); correct it or unset it") from None
    deadline, answered = time.monotonic() + seconds, False
    first = time.monotonic()
    while True:
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(2.0)
                try:
                    probe.connect(address)
                    return
                except ConnectionRefusedError:
                    answered = True  # the host is there, and rank 0 not yet
                except OSError as error:
                    reason = error.strerror or "no answer"
        now = time.monotonic()
        if not answered and now - first > min(seconds, _UNREACHABLE):
            raise ConfigError(
                f"rank {world.rank} on {socket.gethostname()} cannot reach {place} ({reason}); it has to be an address "
                "of rank 0's host in a network that all hosts share"
            )
        if now > deadline:
            raise PeerError(
                f"rank 0 has not come to {world.master_addr}:{world.master_port} within {seconds:g} s; its own output "
                "says why, or give it more time with --rendezvous_timeout"
            )
        _wait(asked)


def _open(world: World, seconds: float, asked: Asked):
    """The store. A program that listens there and speaks another language would keep torch waiting for ever."""
    from torch.distributed import TCPStore

    def connect() -> None:
        try:
            opened.append(
                TCPStore(
                    world.master_addr,
                    world.master_port,
                    world.world_size,
                    is_master=world.rank == 0,
                    timeout=timedelta(seconds=seconds),
                    wait_for_workers=False,
                )
            )
        except (RuntimeError, OSError) as error:
            reasons.append(str(error).splitlines()[0][:200])

    opened, reasons = [], []
    attempt = threading.Thread(target=connect, name="rendezvous", daemon=True)
    attempt.start()
    deadline = time.monotonic() + seconds
    while attempt.is_alive() and time.monotonic() < deadline:
        attempt.join(_POLL)
        if not opened and asked():
            _wait(asked)
    if not opened:
        reason = next(iter(reasons), f"no answer within {seconds:g} s")
        raise ConfigError(
            f"rank {world.rank} cannot meet the others at {world.master_addr}:{world.master_port} ({reason}); another "
            "program may be there: give another port with --master_port or MASTER_PORT"
        )
    return opened[0]


def _greet(store, world: World, run: str, deadline: float, seconds: float, asked: Asked) -> None:
    """Return once all ranks have come; every rank gets the same verdict."""
    if world.rank == 0:
        store.set(_RUN, run)
    else:
        _await(store, world, _RUN, deadline, asked)
        if store.get(_RUN).decode() != run:
            raise ConfigError(
                f"another run listens at {world.master_addr}:{world.master_port}: it has another --run_dir, another "
                "number of ranks or is another job; give this one a port of its own with --master_port or MASTER_PORT"
            )
    twice = store.add(f"megagpt/count{world.rank}", 1) > 1
    me = f"process {os.getpid()} on {socket.gethostname()}"
    if twice:
        other = store.get(f"megagpt/rank{world.rank}").decode()
        text = f"two processes are rank {world.rank}: {other} and {me}; give each its own RANK"
        _decide(store, f"ConfigError {text}")
        raise ConfigError(text)
    store.set(f"megagpt/rank{world.rank}", me)
    try:
        if world.rank == 0:
            _count(store, world, deadline, seconds, asked)
        _await(store, world, _VERDICT, deadline + 10, asked)
    except Stopped as stop:
        _decide(store, f"Stopped {name()} stops: {stop}")  # too late where all have met: the first step will heed it
    _heed(store, world)


def _decide(store, verdict: str) -> None:
    """Write the verdict, unless there is one: all ranks go by the first."""
    store.compare_set(_VERDICT, "", verdict)


def _heed(store, world: World) -> None:
    """Return if all are to go on; raise what the verdict says."""
    kind, _, text = store.get(_VERDICT).decode().partition(" ")
    if kind == "go":
        return
    if world.rank == 0:
        if kind == "Stopped":
            print(text, flush=True)
        time.sleep(5 * _POLL)  # the others read it before this process ends, and the store with it
    error = {"ConfigError": ConfigError, "Stopped": Stopped}.get(kind, PeerError)(text)
    error.on_every_rank = True
    raise error


def _count(store, world: World, deadline: float, seconds: float, asked: Asked) -> None:
    """On rank 0: wait for the others and say so, or who is missing."""
    missing = list(range(1, world.world_size))
    while missing and not store.check([_VERDICT]):
        missing = [rank for rank in missing if not store.check([f"megagpt/rank{rank}"])]
        if missing and time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            _decide(
                store,
                f"PeerError {world.world_size - len(missing)} of {world.world_size} ranks have come to "
                f"{world.master_addr}:{world.master_port} within {seconds:g} s and rank {shown} is missing; its own "
                "output says why, WORLD_SIZE may be wrong, or --rendezvous_timeout is too short for this cluster",
            )
            return
        if missing:
            _wait(asked)
    _decide(store, "go")


def _await(store, world: World, key: str, deadline: float, asked: Asked) -> None:
    try:
        while not store.check([key]):
            if time.monotonic() > deadline:
                raise PeerError(
                    f"rank 0 at {world.master_addr}:{world.master_port} does not answer; its own output says why"
                )
            _wait(asked)
    except RuntimeError:  # of the store: its other end has closed
        raise PeerError(
            f"rank 0 at {world.master_addr}:{world.master_port} has ended; its own output says why"
        ) from None
