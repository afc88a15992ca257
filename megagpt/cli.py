"""The ``megagpt`` command: finds the sub-command and hands it the remaining arguments.

Nothing heavy is imported before a command is chosen, so ``megagpt --help`` and ``--version`` answer at once.
"""

import importlib
import os
import signal
import sys

from megagpt import dist
from megagpt.errors import ConfigError, nearest
from megagpt.version import __version__

COMMANDS = {  # name: (module, function of the remaining arguments, one line of help)
    "launch": ("megagpt.dist.launch", "launch_main", "start a script on this host's GPUs, with its true exit code"),
    "prepare": ("megagpt.data.main", "prepare_main", "turn text files into a tokenised corpus"),
    "data": ("megagpt.data.main", "data_main", "verify, merge or describe tokenised corpora"),
    "tasks": ("megagpt.finetune.listing", "tasks_main", "list the tasks that finetune.py knows by name"),
    "finetune": ("megagpt.finetune.commands", "finetune_main", "compare fine-tuning runs, pack a GLUE submission"),
    "study": ("megagpt.finetune.study", "study_main", "sweep fine-tuning: blocks taken over, examples, ablations"),
    "predict": ("megagpt.finetune.predict", "predict_main", "answer for the rows of a file with a fine-tuned model"),
    "slurm": ("megagpt.tools.slurm", "slurm_main", "write, submit and watch jobs for Slurm"),
    "preflight": (
        "megagpt.tools.preflight",
        "preflight_main",
        "check and measure the hosts of a job",
    ),
    "plan": ("megagpt.tools.plan", "plan_main", "memory, traffic and time of a run before a cluster is booked"),
    "doctor": ("megagpt.tools.doctor", "doctor_main", "look at this machine: what works, what does not, the way out"),
    "selftest": ("megagpt.train.selftest", "selftest_main", "a run that is killed and resumed against one that is not"),
    "warm": ("megagpt.train.warm", "warm_main", "compile what a run needs, before its ranks start on a node"),
    "export": ("megagpt.export.main", "export_main", "write a model as a folder for transformers"),
    "import": ("megagpt.export.importing", "import_main", "read a model of Hugging Face's or OpenAI's"),
    "generate": ("megagpt.evaluate.main", "generate_main", "sample text from a run"),
    "serve": ("megagpt.serve.main", "serve_main", "answer requests over HTTP as OpenAI's API does, with a page to try"),
    "evaluate": ("megagpt.evaluate.measure", "evaluate_main", "measure a run on texts and tasks"),
    "zeroshot": ("megagpt.zeroshot.main", "zeroshot_main", "ask a run tasks that it was not trained for"),
}


def main(argv: list[str] | None = None) -> int:
    """Run ``megagpt`` with ``argv`` (the process's own arguments when None); the exit code."""
    args = sys.argv[1:] if argv is None else argv
    return dist.run_main(lambda: _run(args))


def _run(args: list[str]) -> int:
    while args and args[0].replace("-", "_").startswith("__local_rank="):  # the deepspeed launcher's, before all else
        args = args[1:]
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        print(_help())
        return 0
    if command in ("-V", "--version"):
        print(f"megagpt {__version__}")
        return 0
    if command not in COMMANDS:
        if nearest(command[:80], ["train"]):
            raise ConfigError("megagpt has no command train: deepspeed train.py ... trains, or python train.py ...")
        raise ConfigError(f"unknown command {command[:80]!r}{nearest(command[:80], COMMANDS)}; see megagpt --help")
    module, function, _ = COMMANDS[command]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that does not know a character shows another
    try:
        code = getattr(importlib.import_module(module), function)(args[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # megagpt ... | head: whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere, in silence
        return 128 + signal.SIGPIPE
    return code


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {help_line}" for name, (_, _, help_line) in COMMANDS.items())
    return f"""usage: megagpt COMMAND [OPTIONS]

commands:
{commands}

megagpt COMMAND --help lists a command's options; megagpt --version tells the version.
Training: deepspeed train.py --help; fine-tuning: deepspeed finetune.py --help"""
