"""``make quickstart-finetune``: from a pre-trained model to a classifier, with the commands a user would type.

The task is made from the standard library of the running Python: which package does a docstring belong to? The
quickstart's model, pre-trained first where it is not there yet, is fine-tuned on it, beside itself from scratch.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import torch

from megagpt.data.docstrings import write_task
from megagpt.tools import quickstart

TASK = Path("data/quickstart-docstrings")
RUN_DIR = Path("runs/quickstart-finetune")
EPOCHS = 3


def main(argv: list[str] | None = None) -> int:
    """Pre-train unless that is done, fine-tune twice, report; the exit code of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(prog="make quickstart-finetune", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--init_from", type=Path, default=quickstart.RUN_DIR, help="the pre-trained run, or a .safetensors file"
    )
    parser.add_argument("--task_data", type=Path, default=TASK, help="folder of the task's files")
    parser.add_argument("--run_dir", type=Path, default=RUN_DIR, help="folder of the two fine-tuning runs")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the task's training file")
    parser.add_argument("--limit_train", type=int, help="training examples; all of them by default")
    args = parser.parse_args(argv)
    is_there = args.init_from.suffix == ".safetensors" or (args.init_from / "summary.json").exists()
    if not is_there and (code := quickstart.main(["--run_dir", str(args.init_from)])):
        return code
    write_task(args.task_data)
    for name, flags in (("pretrained", []), ("from_scratch", ["--from_scratch"])):
        command = finetune_command(args.task_data, args.init_from, args.run_dir / name, args.epochs)
        limit = ["--limit_train", str(args.limit_train)] if args.limit_train else []
        if code := quickstart.run([*command, *limit, *flags]):
            return code
    print(report(args.run_dir, args.task_data))
    return 0


def finetune_command(task: Path, init_from: Path, run_dir: Path, epochs: int) -> list[str]:
    """Two ranks, on a CPU two processes that talk over gloo; one on a machine with a single GPU."""
    ranks = 1 if torch.cuda.device_count() == 1 else 2
    launcher = f"deepspeed --quiet --num_gpus {ranks}{quickstart.port_flag()} finetune.py"
    files = f"--train {task}/train.jsonl --valid {task}/valid.jsonl --text_column text --label_column label"
    # A small model takes larger steps than the paper's.
    length = f"--epochs {epochs} --lr 1e-3 --order grouped --global_batch_size 32 --micro_batch_size 16"
    flags = f"--ds_config ds_configs/cpu.json {files} --init_from {init_from} {length} --run_dir {run_dir}"
    return [*launcher.split(), *flags.split()]


def report(run_dir: Path, task: Path) -> str:
    """Both accuracies and that of the most frequent package."""
    values = {}
    for name in ("pretrained", "from_scratch"):
        summary = json.loads((run_dir / name / "summary.json").read_text(encoding="utf-8"))
        values[name] = next(iter(summary["metrics"].values()))["accuracy"]
    train, valid = (_labels(task / f"{part}.jsonl") for part in ("train", "valid"))
    majority = valid[train.most_common(1)[0][0]] / valid.total()
    return f"""
which of {len(train)} packages does a docstring belong to: {valid.total()} docstrings of modules not seen in training
fine-tuned after pre-training   {values["pretrained"]:.1%} right
the same model from scratch     {values["from_scratch"]:.1%}
always the largest package      {majority:.1%}
run folders                     {run_dir}/pretrained, {run_dir}/from_scratch"""


def _labels(path: Path) -> Counter:
    with path.open(encoding="utf-8") as file:
        return Counter(json.loads(line)["label"] for line in file)


if __name__ == "__main__":
    sys.exit(main())
