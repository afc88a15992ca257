"""One message and the right exit code, whatever fails on however many ranks."""

import os
import subprocess
import sys

import pytest
from distributed import free_port, rank_env, run_ranks

from megagpt.dist import everywhere, run_main
from megagpt.errors import ConfigError, DataError, MegaGPTError, StorageError


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
    ],
    ids=str,
)
def test_exit_codes(fn, code, shown, capsys):
    if isinstance(fn, str):
        fn = raising(fn)
    assert run_main(fn, {}) == code
    assert capsys.readouterr().err == shown


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
import os, sys, time
from megagpt.dist import run_main
from megagpt.errors import ConfigError

def fn():
    time.sleep(float(sys.argv[2]) if os.environ["RANK"] == "0" else 0.3)
    if os.environ["RANK"] in sys.argv[1].split(","):
        raise ConfigError("told")

sys.exit(run_main(fn))
"""


def run_program(failing, *, leader_seconds, ranks=3):
    port = free_port()
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, failing, str(leader_seconds)],
            env={**os.environ, **rank_env(rank, ranks, port, "/tmp")},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    shown = [job.communicate(timeout=60)[1] for job in jobs]
    return [job.returncode for job in jobs], shown


def test_a_common_error_is_shown_once():
    codes, shown = run_program("0,1,2", leader_seconds=0.1)
    assert codes == [2, 2, 2]
    assert "".join(shown) == "error: told\n"


def test_a_common_error_is_shown_once_when_the_first_rank_is_the_last_to_fail():
    codes, shown = run_program("0,1,2", leader_seconds=1.0)
    assert codes == [2, 2, 2]
    assert "".join(shown) == "error: told\n"


def test_a_rank_that_fails_alone_speaks_for_itself():
    codes, shown = run_program("2", leader_seconds=4.5)
    assert codes == [0, 0, 2]
    assert "".join(shown[:2]) == ""
    assert shown[2].startswith("rank 2 on ")
    assert shown[2].endswith(": error: told\n")


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
