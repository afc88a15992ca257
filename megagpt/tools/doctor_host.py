"""Checks of the machine: locks of broken builds, caches, disk, shared memory, Slurm, and the ranks as they resolve."""

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from megagpt import dist
from megagpt.config.presets import model_preset
from megagpt.errors import ConfigError
from megagpt.model.config import GPTConfig
from megagpt.tools.doctor_finding import Finding, error, size, warning
from megagpt.tools.doctor_packages import output

_SHM_PER_RANK = 40 << 20  # bytes of /dev/shm; NCCL takes some 33 MB a peer, and Docker gives 64 MB in all
_CHECKPOINT = 14  # bytes a parameter: weights in 16 bit, float32 master weights and two moments
_KEPT = 4  # checkpoints beside the one being written: the best and the last three
_QUIET = 600.0  # seconds: a build may take so long
_QUIET_ELSEWHERE = 24 * 3600.0  # ... where its process may be on another host
_MOUNTS = Path("/proc/mounts")
# As Linux names them in /proc/mounts.
_NETWORK = re.compile(
    r"nfs4?|lustre|gpfs|beegfs|cifs|smb3?|smbfs|ceph|afs|9p|pvfs2|orangefs|wekafs|panfs|fuse\.(sshfs|glusterfs|ceph\S*)"
)


def examine(run_dir: str, model: str, *, remove_locks: bool, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """The checks, in order. ``remove_locks`` removes the locks that nobody holds."""
    yield from locks(extensions_folder(env), remove=remove_locks)
    yield caches(env)
    yield disk(Path(run_dir), model)
    yield shared_memory(env)
    yield slurm(env)
    yield ranks(env)


def extensions_folder(env: Mapping[str, str]) -> Path:
    """Where torch builds C++ and CUDA extensions."""
    return Path(env.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def locks(folder: Path, *, remove: bool) -> Iterator[Finding]:
    """The locks under ``folder``: a killed build leaves one, and the next run waits for ever without a word."""
    found = sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})
    stale = [lock for lock in found if not held(lock)]
    if remove:
        for lock in stale:
            lock.unlink(missing_ok=True)
            yield Finding("build lock", f"{lock} removed: no process held it")
        found = [lock for lock in found if lock not in stale]
        stale = []
    for lock in stale:
        yield error(
            "build lock",
            f"{lock}, {_age(lock) / 60:,.0f} minutes old, held by no process",
            "a run that needs this extension stands still at 'Loading extension module'",
            "megagpt doctor --remove_locks",
        )
    for lock in found:
        if lock not in stale:
            yield Finding("build lock", f"{lock} belongs to a build that goes on")
    if not found and not remove:
        yield Finding("build lock", f"none in {folder}")


def held(lock: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether a process has the lock open, or may have it: one of another user or host cannot be looked at."""
    age = _age(lock)
    if network_file_system(lock, mounts):
        return age < _QUIET_ELSEWHERE
    hidden = False
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for handle in (process / "fd").iterdir():
                try:
                    if handle.samefile(lock):
                        return True
                except OSError:  # closed meanwhile, or a pipe
                    continue
        except PermissionError:
            hidden = True
        except OSError:  # has ended meanwhile
            continue
    return hidden and age < _QUIET


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def network_file_system(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """The kind of the network file system that ``path`` is, or would be, on; None for a local disk."""
    resolved = str(path.expanduser().absolute().resolve())
    best, kind = "", ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        _, point, name, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind if _NETWORK.fullmatch(kind) else None


def caches(env: Mapping[str, str]) -> Finding:
    """Where compiled kernels are kept."""
    folders = {
        "TRITON_CACHE_DIR": Path(env.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        "TORCH_EXTENSIONS_DIR": extensions_folder(env),
    }
    remote = {name: f"{folder} ({kind})" for name, folder in folders.items() if (kind := network_file_system(folder))}
    if remote:
        return warning(
            "caches",
            f"on a network file system: {', '.join(remote.values())}",
            "many ranks that compile into it at once find files lost, locked or stale",
            f"export {' '.join(f'{name}=/tmp/$USER-{name}' for name in remote)}; the scripts of slurm/ do so",
        )
    return Finding("caches", ", ".join(map(str, folders.values())))


def disk(folder: Path, model: str) -> Finding:
    """Whether the checkpoints of ``model`` fit where runs are to write."""
    there = folder.absolute()
    while not os.path.exists(there):  # which a folder that may not be entered is no reason to fail for
        there = there.parent
    if not os.access(there, os.W_OK):
        return error("disk", f"{there} cannot be written to", "no run can start there", "choose another --run_dir")
    free = shutil.disk_usage(there).free
    needed = GPTConfig(**model_preset(model)).n_params() * _CHECKPOINT * (_KEPT + 1)
    found = f"{size(free)} free in {there}"
    if free < needed:
        return warning(
            "disk",
            found,
            f"a run of {model} keeps {_KEPT} checkpoints and writes a fifth: {size(needed)}",
            "free some space, lower --keep_last, or choose another --run_dir",
        )
    return Finding("disk", found)


def shared_memory(env: Mapping[str, str]) -> Finding:
    """/dev/shm, through which the ranks of a host talk to each other."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return error(
            "shared memory",
            "there is no /dev/shm",
            "NCCL cannot connect the GPUs of this host",
            "start the container with --shm-size=16g or --ipc=host",
        )
    local = env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_NTASKS_PER_NODE") or "8"
    ranks_here = int(local) if local.isdigit() else 8
    found = f"{size(usage.free)} free of {size(usage.total)} in /dev/shm"
    if usage.free < ranks_here * _SHM_PER_RANK:
        return warning(
            "shared memory",
            found,
            f"{ranks_here} ranks need about {size(ranks_here * _SHM_PER_RANK)}",
            "start the container with --shm-size=16g or --ipc=host, or remove what killed jobs left in /dev/shm",
        )
    return Finding("shared memory", found)


def slurm(env: Mapping[str, str]) -> Finding:
    """Slurm's commands, and the job that this process is in."""
    absent = [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]
    job = env.get("SLURM_JOB_ID")
    if len(absent) == 4 and job is None:
        return Finding("Slurm", "not on this machine")
    version = (output(["srun", "--version"]) or "installed, and no cluster is configured").strip()
    where = f", in job {job}" if job else ""
    if absent:
        return warning(
            "Slurm",
            f"{version}{where}; without {', '.join(absent)}",
            "the batch scripts of slurm/ call them",
            "load the cluster's module for Slurm, or add its commands to PATH",
        )
    refused = re.search(r"^JobRequeue\s*=\s*0", output(["scontrol", "show", "config"]) or "", re.MULTILINE)
    if refused:
        return warning(
            "Slurm",
            f"{version}{where}; the cluster does not requeue jobs by itself",
            "a job whose node fails does not come back",
            "ask for JobRequeue=1, or submit again: the same command goes on",
        )
    return Finding("Slurm", f"{version}{where}")


def ranks(env: Mapping[str, str]) -> Finding:
    """The ranks and their meeting point, as a run that starts here would take them from the environment."""
    try:
        world = dist.resolve_world(env)
    except ConfigError as problem:
        return error("ranks", str(problem), "a run that starts here ends with this message", "correct the variables")
    if world.world_size == 1:
        return Finding("ranks", f"one process on {socket.gethostname()}; deepspeed, torchrun or srun start more")
    found = (
        f"rank {world.rank} of {world.world_size} ({world.launcher}), {world.local_rank} of {world.local_world_size} "
        f"on {socket.gethostname()}; they meet at {world.master_addr}:{world.master_port}"
    )
    try:
        socket.getaddrinfo(world.master_addr, world.master_port)
    except OSError as problem:
        return error(
            "ranks",
            found,
            f"{world.master_addr} has no address here ({problem.strerror or problem}): the ranks cannot meet",
            "set MASTER_ADDR to an address of rank 0's host that every host can reach; under Slurm unset it",
        )
    return Finding("ranks", found)
