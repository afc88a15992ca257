"""``make quickstart``: the way from text to a trained model, with the commands a user would type, shown as they run.

Its corpus is the standard library of the running Python, so nothing is downloaded. A second run goes on where the
first was interrupted; when that is finished it only shows the results again.
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

CORPUS = Path("data/quickstart")
RUN_DIR = Path("runs/quickstart")
STEPS = 800  # about three minutes on two cores
BIN = Path(sys.executable).parent
INTERRUPTED = 130  # as a shell reports Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Prepare, train, sample, report; the exit code of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(prog="make quickstart", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="prefix of the prepared corpus")
    parser.add_argument("--run_dir", type=Path, default=RUN_DIR, help="folder of the run")
    args = parser.parse_args(argv)
    if not Path(f"{args.corpus}.json").exists() and (code := run(prepare_command(args.corpus))):
        return code
    if code := run(train_command(args.corpus, args.run_dir, args.steps)):
        return code
    if code := run(generate_command(args.run_dir)):
        return code
    print(report(args.run_dir))
    return 0


def prepare_command(corpus: Path) -> list[str]:
    flags = "--corpus python-stdlib --tokenizer train:4096 --valid_fraction 0.05"
    return ["megagpt", "prepare", *flags.split(), "--output", str(corpus)]


def train_command(corpus: Path, run_dir: Path, steps: int) -> list[str]:
    """Two ranks, on a CPU two processes that talk over gloo; one on a machine with a single GPU."""
    ranks = 1 if torch.cuda.device_count() == 1 else 2
    launcher = f"deepspeed --quiet --num_gpus {ranks}{port_flag()} train.py --ds_config ds_configs/cpu.json"
    # Small batches suit a small model; less than one pass over the corpus needs no dropout.
    model = "--model tiny --dropout 0 --lr 3e-3 --global_batch_size 16 --micro_batch_size 8"
    quarter = max(1, steps // 4)
    length = f"--max_steps {steps} --eval_interval {quarter} --eval_steps 16 --save_interval {quarter}"
    data = ["--data", str(corpus), "--valid_data", f"stdlib={corpus}-valid"]
    return [*launcher.split(), *model.split(), *length.split(), *data, "--run_dir", str(run_dir)]


def port_flag(default: int = 29500) -> str:
    """Nothing where the launcher's ``default`` port is free, else the flag that names another one."""
    with socket.socket() as listener:
        for port in (default, 0):
            with suppress(OSError):
                listener.bind(("", port))
                break
        port = listener.getsockname()[1]
    return "" if port == default else f" --master_port {port}"


def generate_command(run_dir: Path) -> list[str]:
    prompt = 'def parse_header(line):\n    """'
    return ["megagpt", "generate", "--from", str(run_dir), "--prompt", prompt, "--max_tokens", "120", "--seed", "1"]


def run(command: list[str]) -> int:
    """Show ``command`` as one would type it, run it with this Python's own programs, and return its exit code."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}  # each of two ranks gets its share of the cores
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed warns that it looked for another
    with subprocess.Popen([str(BIN / command[0]), *command[1:]], env={**env, **os.environ}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C has reached the command too: let it end in order
            process.wait()
            print("\ninterrupted; the same make command goes on", flush=True)
            return INTERRUPTED


def report(run_dir: Path) -> str:
    """What came out of the run in ``run_dir``, from its summary."""
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    valid = summary["valid"]["stdlib"]
    before, after = valid["first"], valid["last"]
    return f"""
validation loss   {before["loss"]:.3f} before training, {after["loss"]:.3f} after {summary["steps"]} steps
bits per byte     {before["bits_per_byte"]:.3f} before training, {after["bits_per_byte"]:.3f} after
speed             {summary["tokens_per_s"]:,.0f} tokens/s
run folder        {run_dir} (summary.md, loss.png, metrics.jsonl, checkpoints)
TensorBoard       tensorboard --logdir {run_dir}
more text         source .venv/bin/activate; megagpt generate --from {run_dir} --prompt "def "
your own text     README.md"""


if __name__ == "__main__":
    sys.exit(main())
