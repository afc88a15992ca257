"""The megagpt command: quick answers, one line for a slip, every command really there."""

import importlib
import os
import subprocess
import sys

import pytest

from megagpt.cli import COMMANDS, main
from megagpt.version import __version__

HEAVY = {"torch", "numpy", "deepspeed", "tokenizers", "transformers", "tyro", "rich", "hjson", "pydantic"}


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--version"], [], ["nonsense"]], ids=str)
def test_quick_answers_import_nothing_heavy(argv):
    code = (
        "import sys\nfrom megagpt.cli import main\n"
        f"code = main({argv!r})\nprint(sorted({HEAVY!r} & set(sys.modules)))\nsys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.endswith("[]\n"), run.stdout
    assert run.returncode == (2 if argv == ["nonsense"] else 0)


def test_modules_that_check_settings_import_nothing_heavy():
    modules = "megagpt, megagpt.cli, megagpt.errors, megagpt.dist, megagpt.config.fields, megagpt.config.deepspeed"
    code = f"import sys, {modules}\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "[]\n"


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megagpt {__version__}\n"


def test_python_m_megagpt_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "megagpt", "--version"], capture_output=True, text=True, timeout=60)
    assert shown.stdout == f"megagpt {__version__}\n", shown.stderr


def test_help_keeps_the_arguments_that_have_no_flag(capsys):
    assert main(["data", "info", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "positional arguments" in shown
    assert "--prefix" not in shown


def test_a_slip_in_a_command_is_answered_with_the_nearest(capsys):
    assert main(["prepar"]) == 2
    shown = capsys.readouterr().err
    assert shown == "error: unknown command 'prepar' (did you mean 'prepare'?); see megagpt --help\n"
    assert main(["train"]) == 2
    assert "deepspeed train.py" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=1"])
def test_what_the_deepspeed_launcher_puts_before_a_command_is_no_command(capsys, flag):
    """``deepspeed --module megagpt evaluate ...`` starts each rank with its number first."""
    assert main([flag, "--version"]) == 0
    assert capsys.readouterr().out == f"megagpt {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there(name):
    module, function, _ = COMMANDS[name]
    assert callable(getattr(importlib.import_module(module), function))


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_traceback():
    """megagpt generate ... | head showed one."""
    argv = ["plan", "--model", "gpt1", "--gpu", "h100-80gb", "--tokens", "1e9", "--json"]
    command = [sys.executable, "-c", f"import sys; from megagpt.cli import main; sys.exit(main({argv!r}))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141  # as of a program that the signal has ended


def test_a_character_that_the_terminal_does_not_know_is_no_crash():
    encoding = {**os.environ, "PYTHONIOENCODING": "ascii"}
    show = "import sys; from megagpt import cli; cli.COMMANDS['show'] = ('show', 'show', ''); sys.modules['show'] = cli"
    code = f"{show}; cli.show = lambda argv: print('Stra\u00dfe'); sys.exit(cli.main(['show']))"
    done = subprocess.run([sys.executable, "-c", code], env=encoding, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"Stra?e\n", b"")
