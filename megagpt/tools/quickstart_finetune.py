"""``make quickstart-finetune``: from a pre-trained model to a classifier, with the commands a user would type.

The task is made from the standard library of the running Python: which package does a docstring belong to? The
quickstart's model is fine-tuned on it, beside itself from scratch. Where it is not there yet, one of the same shape is
pre-trained first, for half as long: the whole is to end within five minutes on two cores.
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
EPOCHS = 2
MODEL = "model"  # in the folder of the runs: the pre-trained one
STEPS = quickstart.STEPS // 2  # of pre-training


def main(argv: list[str] | None = None) -> int:
    """Pre-train unless that is done, fine-tune twice, report; the exit code of the first command that fails, else 0."""
    parser = argparse.ArgumentParser(prog="make quickstart-finetune", description=__doc__.partition("\n")[0])
    parser.add_argument("--init_from", type=Path, help="a pre-trained run or .safetensors file; the quickstart's")
    parser.add_argument("--task_data", type=Path, default=TASK, help="folder of the task's files")
    parser.add_argument("--run_dir", type=Path, default=RUN_DIR, help="folder of the runs")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the task's training file")
    parser.add_argument("--limit_train", type=int, help="training examples; all of them by default")
    args = parser.parse_args(argv)
    init_from = args.init_from or _pretrained(args.run_dir)
    if init_from is None:
        init_from = args.run_dir / MODEL
        if code := quickstart.main(["--run_dir", str(init_from), "--steps", str(STEPS)]):
            return code
    write_task(args.task_data)
    for name, flags in (("pretrained", []), ("from_scratch", ["--from_scratch"])):
        command = finetune_command(args.task_data, init_from, args.run_dir / name, args.epochs)
        limit = ["--limit_train", str(args.limit_train)] if args.limit_train else []
        if code := quickstart.run([*command, *limit, *flags]):
            return code
    print(report(args.run_dir, args.task_data))
    return 0


def _pretrained(run_dir: Path) -> Path | None:
    """The pre-trained run that is finished: the one made here before, else that of ``make quickstart``."""
    found = [path for path in (run_dir / MODEL, quickstart.RUN_DIR) if (path / "summary.json").exists()]
    return found[0] if found else None


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
