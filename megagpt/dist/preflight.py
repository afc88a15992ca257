"""Before a long run: does every host of this job do what the others do?

Each rank looks at its own host: the run folder's disk, shared memory, the rate of a matrix product. Then all compare
clocks and measure all-reduces: over everything, within each host, and between hosts, two at a time. A host that fails a
check or is far behind the others is named. The process group exists, and every rank calls :func:`preflight`.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from megagpt.dist.gather import gather_json
from megagpt.dist.run_disk import folder_problem, measure_disk
from megagpt.dist.world import World, host_name, is_main
from megagpt.errors import ConfigError, Stopped

_MOST_CLOCK = 2.0  # seconds that two hosts' clocks may differ; locks and "newer than" compare times of files
_SHM_PER_RANK = 40 << 20  # bytes; NCCL takes some 33 MB of /dev/shm a peer, and Docker gives 64 MB in all
_SLOW = {"cuda": 0.8, "cpu": 0.5}  # of the best rank's matrix products; cores are shared, GPUs are not
_SLOW_LINK = 0.5  # of the median bandwidth
_MOST_ROUNDS = 16  # of pairs; with 16 hosts or fewer every pair is measured
_TIMEOUT = timedelta(minutes=2)


@dataclass
class Report:
    """What was measured, and the hosts that are not as they should be, each with the reason."""

    lines: list[str] = field(default_factory=list)
    failing: dict[str, str] = field(default_factory=dict)
    slow: dict[str, str] = field(default_factory=dict)


def preflight(world: World, folder: Path, device) -> Report:
    """Check and measure all hosts; the same report on every rank. ``folder`` is the run's, ``device`` this rank's.

    Raises ConfigError where no host can make or use the folder: then it is the folder that is wrong.
    """
    problem = folder_problem(world, folder)
    own = {"host": host_name(), **_examine(world, folder, device, problem)}
    ranks = gather_json(own)
    report = Report()
    for rank in ranks:
        if rank.get("problem"):
            report.failing.setdefault(rank["host"], rank["problem"])
    report.lines += _local_lines(ranks)
    if report.failing or world.world_size == 1:
        return report  # a collective with a broken host could hang
    report.lines += _clocks(ranks, report)
    links = _links([rank["host"] for rank in ranks], world.rank, device)
    judge(report, [rank["host"] for rank in ranks], [rank["gemm"] for rank in ranks], links, device.type)
    report.lines += _link_lines(links)
    return report


def check(world: World, folder: Path, device, *, slow_too: bool) -> None:
    """Do it, say what came out, and raise for hosts that are not fit: those that fail, with ``slow_too`` the slow ones.

    Raises ConfigError, or Stopped where the job is to start again without them; see :func:`enforce`.
    """
    begun = time.monotonic()
    report = preflight(world, folder, device)
    if is_main():
        lines = [*report.lines, *(f"WARNING: {host} is slow: {reason}" for host, reason in report.slow.items())]
        print("\n".join(f"preflight: {line}" for line in lines), flush=True)
        print(f"preflight: took {time.monotonic() - begun:.1f} s", flush=True)
    enforce(report, slow_too=slow_too)


def judge(report: Report, hosts: list[str], gemm: list[float], links: dict[str, list], device: str) -> None:
    """Name the hosts that are slow: ``gemm`` has FLOP/s by rank, ``links`` what :func:`_links` gives."""
    best = max(gemm)
    for host, rate in zip(hosts, gemm, strict=True):
        if rate < _SLOW[device] * best:
            report.slow.setdefault(host, f"matrix products at {_tera(rate)}, where the best rank has {_tera(best)}")
    for kind, between in (("within", "within the host"), ("between", "to other hosts")):
        rates: dict[str, float] = {}  # each host's best: one bad partner does not condemn it
        for names, bandwidth, _ in links[kind]:
            for name in names:
                rates[name] = max(bandwidth, rates.get(name, 0.0))
        if len(rates) < 3:  # of two nobody knows which is the slow one
            continue
        usual = statistics.median(rates.values())
        for host, rate in rates.items():
            if rate < _SLOW_LINK * usual:
                report.slow.setdefault(host, f"all-reduce {between} at {_giga(rate)}, where {_giga(usual)} is usual")


def enforce(report: Report, *, slow_too: bool, env: Mapping[str, str] = os.environ) -> None:
    """Raise for the hosts that are not fit to run on: every rank has the same report, so all do.

    Where the job's script asks for it (MEGAGPT_EXCLUDE, and MEGAGPT_EXCLUDE_FILE for the names), Stopped is raised: the
    job goes back into the queue and starts again elsewhere. Otherwise it is a ConfigError with the flag to exclude them.
    """
    unfit = {**(report.slow if slow_too else {}), **report.failing}
    if not unfit:
        return
    told = "; ".join(f"{host}: {reason}" for host, reason in sorted(unfit.items()))
    if env.get("MEGAGPT_EXCLUDE") and env.get("MEGAGPT_EXCLUDE_FILE"):
        if is_main(env):
            names = "".join(f"{host}\n" for host in sorted(unfit))
            Path(env["MEGAGPT_EXCLUDE_FILE"]).write_text(names, encoding="utf-8")
            print(f"preflight: going on without {told}", flush=True)
        raise Stopped(f"the preflight found {told}")
    error = ConfigError(
        f"the preflight found hosts that this run should not start on: {told}; leave them out with sbatch "
        f"--exclude={','.join(sorted(unfit))}, or set MEGAGPT_EXCLUDE=1 to have that done"
    )
    error.on_every_rank = True
    raise error


# what each rank finds on its own ------------------------------------------------------------------------------------


def _examine(world: World, folder: Path, device, problem: str | None) -> dict:
    """This rank's figures; "problem" is there where its host is unfit, as with a ``problem`` found before."""
    found: dict = {}
    if problem:
        return {"problem": problem}
    try:
        found["gemm"] = _matrix_products(device)
        if world.local_rank == 0:
            found["free"], found["write"] = measure_disk(folder)
            found["shm"] = _shared_memory(world.local_world_size if device.type == "cuda" else 0)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        found["problem"] = " ".join(f"{type(error).__name__}: {reason}".split())[:200]
    return found


def _shared_memory(ranks: int) -> int:
    """Free bytes of /dev/shm. Raises OSError where that is less than ``ranks`` GPUs need to talk to each other."""
    free = shutil.disk_usage("/dev/shm").free
    if free < ranks * _SHM_PER_RANK:
        raise OSError(f"/dev/shm has {free >> 20} MB free and {ranks} GPUs need {ranks * _SHM_PER_RANK >> 20} MB")
    return free


def _matrix_products(device) -> float:
    """FLOP/s of square products: on a GPU the median of ten, on a core that others may use the mean over a while."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (384, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = _time(lambda: a @ a, device, 10) if device.type == "cuda" else _mean_time(lambda: a @ a, 0.4)
    if not bool(torch.isfinite(a @ a).all()):
        raise RuntimeError("a product of finite matrices is not finite: the device computes wrongly")
    return 2 * size**3 / seconds


def _mean_time(work, least: float) -> float:
    """Seconds a call takes, over calls that together take ``least`` seconds or more."""
    work()
    begun, n, taken = time.perf_counter(), 0, 0.0
    while taken < least:
        work()
        n, taken = n + 1, time.perf_counter() - begun
    return taken / n


# what they find together --------------------------------------------------------------------------------------------


def _clocks(ranks: list[dict], report: Report) -> list[str]:
    """Compare the hosts' clocks: all read theirs as they leave one collective."""
    gather_json(None)
    times = gather_json(time.time())
    middle = statistics.median(times)
    for rank, seen in zip(ranks, times, strict=True):
        if abs(seen - middle) > _MOST_CLOCK:
            report.failing.setdefault(rank["host"], f"its clock is {seen - middle:+.1f} s off the others'")
    return [f"clocks within {max(times) - min(times):.3f} s"]


def _links(hosts: list[str], rank: int, device) -> dict[str, list]:
    """All-reduces: {"all" | "within" | "between": [[host names], bytes/s, seconds of a small one]}, the same everywhere."""
    members: dict[str, list[int]] = {}
    for i, host in enumerate(hosts):
        members.setdefault(host, []).append(i)
    own: dict[str, list] = {"all": [], "within": [], "between": []}
    measured = _measure([list(range(len(hosts)))], rank, device)
    if rank == 0:
        own["all"].append([sorted(members), *measured])
    several = [group for group in members.values() if len(group) > 1]
    measured = _measure(several, rank, device)
    if measured and rank == members[hosts[rank]][0]:
        own["within"].append([[hosts[rank]], *measured])
    for pairs in _rounds(list(members)):
        measured = _measure([[members[a][0], members[b][0]] for a, b in pairs], rank, device)
        for pair in pairs:
            if measured and rank == members[pair[0]][0]:
                own["between"].append([list(pair), *measured])
    every = gather_json(own)
    return {kind: [link for links in every for link in links[kind]] for kind in own}


def _rounds(hosts: list[str]) -> Iterator[list[tuple[str, str]]]:
    """Pairs of hosts in rounds in which each has one partner at most, as in a tournament."""
    if len(hosts) < 2:
        return
    seats = [*hosts, None] if len(hosts) % 2 else list(hosts)
    for _ in range(min(len(seats) - 1, _MOST_ROUNDS)):
        half = len(seats) // 2
        yield [(a, b) for a, b in zip(seats[:half], reversed(seats[half:]), strict=True) if a and b]
        seats = [seats[0], seats[-1], *seats[1:-1]]


def _measure(groups: list[list[int]], rank: int, device) -> tuple[float, float] | None:
    """Bytes per second and latency of all-reduces in this rank's group, all groups at once; None in none of them."""
    import torch
    from torch import distributed

    handles = [distributed.new_group(group, timeout=_TIMEOUT) for group in groups]
    result = None
    for group, handle in zip(groups, handles, strict=True):
        if rank not in group:
            continue
        large = torch.ones((64 << 20 if device.type == "cuda" else 2 << 20) // 4, device=device)
        small = torch.ones(2, device=device)
        latency = _time(lambda t=small, g=handle: distributed.all_reduce(t, group=g), device, 20)
        seconds = _time(lambda t=large, g=handle: distributed.all_reduce(t, group=g), device, 5)
        # What every link carries in a ring: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        carried = 2 * (len(group) - 1) / len(group) * large.nbytes
        result = carried / seconds, latency
        distributed.destroy_process_group(handle)
    distributed.barrier()
    return result


def _time(work: Callable[[], object], device, times: int) -> float:
    """Median seconds of ``work``, after two runs that don't count."""
    import torch

    seconds = []
    for _ in range(times + 2):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[2:])


# how it reads -------------------------------------------------------------------------------------------------------


def _local_lines(ranks: list[dict]) -> list[str]:
    def spread(key: str, shown: Callable[[float], str]) -> str:
        values = [rank[key] for rank in ranks if key in rank]
        return f"{shown(min(values))} to {shown(max(values))}" if values else "not measured"

    hosts = {rank["host"] for rank in ranks}
    return [
        f"{len(hosts)} host{'s' * (len(hosts) != 1)}, {len(ranks)} rank{'s' * (len(ranks) != 1)}",
        f"matrix products {spread('gemm', _tera)}",
        f"run folder: {spread('free', _giga_bytes)} free, written at {spread('write', _giga)}",
        f"/dev/shm: {spread('shm', _giga_bytes)} free",
    ]


def _link_lines(links: dict[str, list]) -> list[str]:
    lines = []
    for kind, name in (("all", "over all ranks"), ("within", "within a host"), ("between", "between two hosts")):
        found = links[kind]
        if found:
            rates, latencies = [link[1] for link in found], [link[2] for link in found]
            slowest = min(found, key=lambda link: link[1])
            lines.append(
                f"all-reduce {name}: {_giga(min(rates))} to {_giga(max(rates))}, {1e6 * min(latencies):.0f} to "
                f"{1e6 * max(latencies):.0f} us" + (f", slowest {' - '.join(slowest[0])}" if len(found) > 1 else "")
            )
    return lines


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s"


def _giga(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"


def _giga_bytes(n: float) -> str:
    return f"{n / 1e9:.3g} GB"
