"""One message and the right exit code, whatever fails on however many ranks."""

import errno
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from distributed import free_port, rank_env, run_ranks

from megagpt.dist import everywhere, run_main
from megagpt.errors import ConfigError, DataError, MegaGPTError, StorageError


def denied(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


@pytest.mark.parametrize(
    ("fn", "code", "shown"),
    [
        (lambda: None, 0, ""),
        (lambda: 5, 5, ""),
        ("ConfigError", 2, "error: told\n"),
        ("DataError", 2, "error: told\n"),
        ("CheckpointError", 3, "error: told\n"),
        ("NumericError", 6, "error: told\n"),
        ("StorageError", 7, "error: told\n"),
        ("KeyboardInterrupt", 130, ""),
        # A folder of somebody else's was a traceback.
        (lambda: denied("/a/b"), 7, "error: no permission for /a/b; ask who owns it, or name another place\n"),
    ],
)
def test_exit_codes(fn, code, shown, capsys):
    if isinstance(fn, str):
        fn = raising(fn)
    assert run_main(fn, {}) == code
    assert capsys.readouterr().err == shown


def test_the_first_process_to_fail_leaves_its_code_where_it_is_asked_to(tmp_path):
    env = {"MEGAGPT_EXIT_FILE": str(tmp_path / "code")}
    assert run_main(lambda: 0, env) == 0
    assert not (tmp_path / "code").exists()
    assert run_main(raising("NumericError"), env) == 6
    assert run_main(raising("DataError"), env) == 2
    assert (tmp_path / "code").read_text() == "6"


def raising(name, text="told"):
    import builtins

    from megagpt import errors

    def fn():
        raise (getattr(errors, name, None) or getattr(builtins, name))(text)

    return fn


def test_a_bug_shows_its_traceback_with_the_ranks_name(capsys):
    assert run_main(raising("ValueError"), {"RANK": "3", "LOCAL_RANK": "3"}) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("rank 3 on ")
    assert "ValueError: told" in shown
    assert "Traceback" in shown


def test_an_answered_help_is_success():
    def helped():
        sys.exit(0)

    assert run_main(helped, {}) == 0


PROGRAM = """
import os, sys
from megagpt.dist import run_main
from megagpt.errors import ConfigError

def fn():
    print("running", flush=True)
    sys.stdin.read()
    if os.environ["RANK"] in sys.argv[1]:
        raise ConfigError("told")

sys.exit(run_main(fn))
"""


@contextmanager
def ranks_that_wait(failing, count=3):
    """Ranks of one job on this host, all inside ``run_main``; each goes on, to fail or not, when its stdin closes."""
    port = free_port()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", PROGRAM, failing]
    jobs = [
        subprocess.Popen(command, env={**os.environ, **rank_env(rank, count, port, "/tmp")}, text=True, **pipes)
        for rank in range(count)
    ]
    try:
        for job in jobs:
            assert job.stdout.readline() == "running\n"
        yield jobs
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def end(job):
    """Let a rank go on to its end: its exit code and what it told the user."""
    told = job.communicate(timeout=60)[1]
    return job.returncode, told


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["first rank first", "first rank last"])
def test_a_common_error_is_shown_once(order):
    with ranks_that_wait("012") as jobs:
        for rank in order:
            jobs[rank].stdin.close()
            jobs[rank].stdin = None
        ended = [end(job) for job in jobs]
    assert ended == [(2, "error: told\n"), (2, ""), (2, "")]


def test_a_rank_that_fails_alone_speaks_for_itself():
    with ranks_that_wait("2") as jobs:
        code, told = end(jobs[2])
        assert [end(job) for job in jobs[:2]] == [(0, ""), (0, "")]
    assert code == 2
    assert told.startswith("rank 2 on ")
    assert told.endswith(": error: told\n")


def failing_apart(failing):
    """Rank ``failing`` fails between collectives while the others wait for it in one; the exit code."""
    import torch

    torch.distributed.init_process_group("gloo")

    def fn():
        torch.distributed.barrier()
        if torch.distributed.get_rank() == failing:
            raise DataError("told")
        torch.distributed.all_reduce(torch.zeros(1))

    return run_main(fn)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_whose_peer_has_ended_says_so_in_a_line(failing):
    """It showed a traceback of sixty lines beside the one sentence that mattered."""
    results = run_ranks(failing_apart, 2, failing)
    (code, told), (lost, line) = results[failing], results[1 - failing]
    assert code == 2
    assert told.endswith("error: told\n")
    assert lost == 4
    assert line.startswith(f"rank {1 - failing} on ")
    assert line.endswith(" stops: another rank has ended; its own output says why\n")
    assert line.count("\n") == 1


# everywhere -----------------------------------------------------------------------------------------------------


def attempt(failing, name):
    """Which error ``everywhere`` raises here when it fails on the ranks ``failing``."""
    import torch

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    try:
        result = everywhere(raising(name, f"told by {rank}") if rank in failing else lambda: rank)
        # Everybody is still in step.
        assert everywhere(lambda: "again") == "again"
        return result
    except Exception as error:
        assert everywhere(lambda: "again") == "again"
        return type(error).__name__, str(error), getattr(error, "on_every_rank", False)
    finally:
        torch.distributed.destroy_process_group()


def attempts(failing, name="DataError", ranks=2):
    return [result for result, _ in run_ranks(attempt, ranks, failing, name)]


def test_everywhere_returns_each_ranks_own_result():
    assert attempts([]) == [0, 1]


def test_what_fails_on_one_rank_is_raised_on_all_with_its_name():
    assert attempts([1]) == [("DataError", "rank 1: told by 1", True)] * 2


def test_what_rank_0_does_for_all_needs_no_name():
    assert attempts([0], "StorageError") == [("StorageError", "told by 0", True)] * 2


def test_what_fails_everywhere_is_raised_as_the_first_rank_tells_it():
    assert attempts([0, 1], "ConfigError") == [("ConfigError", "told by 0", True)] * 2


def test_a_bug_stays_a_bug_where_it_is_and_ends_the_others():
    there, here = attempts([1], "ValueError")
    assert there == ("MegaGPTError", "rank 1: ValueError: told by 1", True)
    assert here == ("ValueError", "told by 1", False)


def test_alone_everywhere_is_the_function_itself():
    assert everywhere(lambda: 7) == 7
    with pytest.raises(StorageError, match="full") as caught:
        everywhere(raising("StorageError", "full"))
    assert caught.value.exit_code == 7
    assert issubclass(StorageError, MegaGPTError)
    with pytest.raises((ConfigError, DataError)):
        everywhere(raising("DataError"))
