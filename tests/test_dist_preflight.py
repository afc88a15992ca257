"""Slow and broken hosts are found and named before a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_ranks

from megagpt.dist.preflight import Report, _rounds, enforce, judge
from megagpt.dist.run_disk import _find
from megagpt.errors import ConfigError, Stopped

HOSTS = ["n1", "n2", "n3", "n4"]
EVEN = {"all": [], "within": [[[h], 100e9, 1e-5] for h in HOSTS], "between": [[["n1", "n2"], 20e9, 2e-5]]}


def judged(gemm, links, device="cuda"):
    report = Report()
    judge(report, HOSTS, gemm, links, device)
    return report.slow


def test_even_hosts_are_all_right():
    assert judged([600e12, 580e12, 610e12, 590e12], EVEN) == {}


def test_a_host_with_slow_products_is_named():
    slow = judged([600e12, 600e12, 400e12, 600e12], EVEN)
    assert slow == {"n3": "matrix products at 400 TFLOP/s, where the best rank has 600 TFLOP/s"}


def test_a_host_with_slow_links_inside_is_named():
    links = {**EVEN, "within": [[["n1"], 100e9, 0], [["n2"], 90e9, 0], [["n3"], 30e9, 0], [["n4"], 100e9, 0]]}
    assert judged([1.0] * 4, links) == {"n3": "all-reduce within the host at 30 GB/s, where 95 GB/s is usual"}


def test_a_host_that_is_slow_with_every_partner_is_named_and_its_partners_are_not():
    pairs = [(a, b) for i, a in enumerate(HOSTS) for b in HOSTS[i + 1 :]]
    links = {**EVEN, "between": [[[a, b], 4e9 if "n2" in (a, b) else 20e9, 0] for a, b in pairs]}
    assert judged([1.0] * 4, links) == {"n2": "all-reduce to other hosts at 4 GB/s, where 20 GB/s is usual"}


@pytest.mark.parametrize("n", range(1, 17))
def test_up_to_sixteen_hosts_every_pair_is_measured_once_and_no_host_twice_a_round(n):
    hosts = [f"n{i}" for i in range(n)]
    rounds = list(_rounds(hosts))
    assert len(rounds) <= 16
    for pairs in rounds:
        named = [host for pair in pairs for host in pair]
        assert len(named) == len(set(named))
    every = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(every) == len(set(every)) == n * (n - 1) // 2


def test_unfit_hosts_stop_the_run_or_are_left_out(tmp_path):
    report = Report(slow={"n2": "slow"}, failing={"n3": "broken"})
    with pytest.raises(ConfigError, match="n2: slow; n3: broken; leave them out with sbatch --exclude=n2,n3"):
        enforce(report, slow_too=True, env={})
    with pytest.raises(ConfigError, match="--exclude=n3,"):
        enforce(report, slow_too=False, env={})
    enforce(Report(slow={"n2": "slow"}), slow_too=False, env={})
    env = {"MEGAGPT_EXCLUDE": "1", "MEGAGPT_EXCLUDE_FILE": str(tmp_path / "exclude")}
    with pytest.raises(Stopped):
        enforce(report, slow_too=True, env=env)
    assert (tmp_path / "exclude").read_text() == "n2\nn3\n"


def _look(folder):
    import torch
    from torch import distributed

    from megagpt.dist import World
    from megagpt.dist.preflight import preflight

    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank // 2 + 1}"
    distributed.init_process_group("gloo")
    world = World(rank, 4, rank % 2, 2, rank // 2, "127.0.0.1", int(os.environ["MASTER_PORT"]), "slurm")
    report = preflight(world, folder, torch.device("cpu"))
    broken = folder / "file" if rank == 3 else folder  # a file where the second host should have its folder
    if rank == 3:
        broken.touch(exist_ok=True)
    world = World(rank, 4, 0, 1, rank, "127.0.0.1", 1, "slurm")
    again = preflight(world, broken, torch.device("cpu"))
    distributed.destroy_process_group()
    return report.lines, report.failing, again.failing


def test_four_ranks_on_two_hosts_are_measured_and_a_broken_host_is_named(tmp_path):
    results = [result for result, _ in run_ranks(_look, 4, tmp_path)]
    assert all(result == results[0] for result in results)
    lines, failing, broken = results[0]
    assert failing == {}
    assert lines[0] == "2 hosts, 4 ranks"
    assert [line.split(":")[0] for line in lines[-3:]] == [
        "all-reduce over all ranks",
        "all-reduce within a host",
        "all-reduce between two hosts",
    ]
    assert broken == {"n2": f"{tmp_path}/file is a file"}
    assert not list(tmp_path.glob(".preflight*"))


# Stops a process for most of the time: it is as slow as on a core that others use, whoever shares this machine.
THROTTLE = """
import os, signal, sys, time
while True:
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
    time.sleep(0.3)
    os.kill(int(sys.argv[1]), signal.SIGCONT)
    time.sleep(0.02)
"""


def _look_while_throttled(folder):
    import torch
    from torch import distributed

    from megagpt.dist import World
    from megagpt.dist.preflight import check

    rank = int(os.environ["RANK"])
    os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
    distributed.init_process_group("gloo")
    world = World(rank, 2, 0, 1, rank, "127.0.0.1", int(os.environ["MASTER_PORT"]), "slurm")
    throttle = subprocess.Popen([sys.executable, "-c", THROTTLE if rank else "", str(os.getpid())])
    try:
        check(world, folder, torch.device("cpu"), slow_too=True)
    except ConfigError as error:
        return str(error)
    finally:
        throttle.kill()
        throttle.wait()
        distributed.destroy_process_group()


def test_a_folder_that_other_hosts_see_is_one_that_cannot_be_made_again(tmp_path):
    assert _find(tmp_path) is None
    assert "has to be on a disk that all hosts share" in _find(tmp_path / "own")
    assert not (tmp_path / "own").exists()
    assert _find(tmp_path / "no" / "run") == f"{tmp_path}/no/run: No such file or directory"


def test_a_slow_host_is_named(tmp_path):
    results = run_ranks(_look_while_throttled, 2, tmp_path)
    for message, _ in results:
        assert "hosts that this run should not start on: n2: matrix products at " in message
    assert "preflight: WARNING: n2 is slow" in results[0][1]
    assert results[1][1] == ""


def test_the_command_runs_alone_and_names_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    assert "error: the run folder cannot be used: " in command(tmp_path / "file" / "run", 2).stderr
    done = command(tmp_path / "new" / "run", 0)
    assert "preflight: 1 host, 1 rank\npreflight: matrix products " in done.stdout


def command(run_dir, code):
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "megagpt", "preflight", "--run_dir", run_dir],
        env=env,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "sbatch --exclude" not in done.stderr
    return done
