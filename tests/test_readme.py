"""The README's commands run as they stand, made small; the other documents name things that exist."""

import ast
import lzma
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import run_ranks

from megagpt.tools.quickstart import port_flag

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(ROOT.glob("docs/*.md"))]

# What a recipe asks for is replaced by the least that shows it works.
SHAPE = {"--n_layer": "2", "--d_model": "32", "--n_head": "2", "--seq_len": "32"}
SMALL = {
    "--max_steps": "2",
    "--global_batch_size": "4",
    "--micro_batch_size": "2",
    "--warmup_steps": "1",
    "--log_interval": "1",
}
LONG = ("--max_tokens", "--eval_interval", "--save_interval")
NEEDS_GPU = "fp16"


def commands():
    """Every command of the README's bash blocks, in its order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def starting_with(*programs):
    return [command for command in commands() if command[0] in programs]


def train_arguments(command):
    """The arguments of ``train.py`` in ``command``, with a small model, few steps and a configuration for CPUs."""
    words = command[command.index("train.py") + 1 :]
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    flags = {words[i]: words[i + 1 : end] for i, end in zip(starts, [*starts[1:], len(words)], strict=True)}
    if NEEDS_GPU in flags["--ds_config"][0]:
        flags["--ds_config"] = ["ds_configs/cpu.json"]
    for flag in LONG:
        flags.pop(flag, None)
    small = SMALL if "--init_from" in flags else {**SMALL, **SHAPE}
    flags.update({flag: [value] for flag, value in small.items()})
    return [word for flag, values in flags.items() for word in (flag, *values)]


def ranks_of(command):
    """How many processes the command's launcher starts on this machine."""
    flag = {"deepspeed": "--num_gpus", "torchrun": "--nproc_per_node"}.get(command[0])
    return int(command[command.index(flag) + 1]) if flag in command else 1


def megagpt(arguments, cwd):
    """Run ``megagpt`` in ``cwd``."""
    [(code, output)] = run_ranks(_megagpt_in, 1, str(cwd), arguments)
    assert code == 0, f"megagpt {shlex.join(arguments)}\n{output}"


def _megagpt_in(folder, arguments):
    from megagpt.cli import main

    os.chdir(folder)
    return main(arguments)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder like the user's: the repository's files, some books, some code, and a tokenizer from elsewhere."""
    import json

    folder = tmp_path_factory.mktemp("workplace")
    for name in ("train.py", "finetune.py", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    texts = [Path(os.__file__).with_name(f"{module}.py").read_text() for module in ("argparse", "ast", "typing")]
    chunks = [text[i : i + 2000] for text in texts for i in range(0, len(text) - 2000, 2000)]
    (folder / "books").mkdir()
    with lzma.open(folder / "books" / "one.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": chunk}) + "\n" for chunk in chunks)
    for name in ("code", "corpus"):
        (folder / name).mkdir()
        for i, text in enumerate(texts):
            (folder / name / f"{i}.txt").write_text(text)
    (folder / "labelled").mkdir()
    for name, rows in (("train", 64), ("dev", 16), ("new", 4)):
        table = "".join(f"{('good', 'bad')[i % 2]} number {i},{i % 2}\n" for i in range(rows))
        (folder / "labelled" / f"{name}.csv").write_text("text,label\n" + table)
    return folder


def _train_in(folder, arguments):
    from megagpt.train.main import main

    os.chdir(folder)
    return main(arguments)


def _finetune_in(folder, arguments):
    from megagpt.finetune.main import main

    os.chdir(folder)
    return main(arguments)


def run_in(workplace, command):
    """Run one of the README's commands, made small, in the user's folder."""
    if command[0] == "megagpt":
        megagpt([word.replace("train:8192", "train:300") for word in command[1:]], workplace)
        return
    if "finetune.py" in command:
        work, arguments = _finetune_in, command[command.index("finetune.py") + 1 :]
    else:
        work, arguments = _train_in, train_arguments(command)
    results = run_ranks(work, ranks_of(command), str(workplace), arguments)
    output = "".join(text for _, text in results)
    assert [code for code, _ in results] == [0] * len(results), output


@pytest.mark.timeout(900)  # a dozen commands
def test_the_readmes_recipes_run_one_after_the_other(workplace):
    prepare, *rest = starting_with("megagpt", "deepspeed", "torchrun", "python")
    run_in(workplace, prepare)
    tokenizer = workplace / "data" / "books.tokenizer.json"
    (workplace / "gpt2.json").write_text(tokenizer.read_text())
    # The README's second corpus stands for any that the reader has.
    code = ["prepare", "--input", "code", "--tokenizer", str(tokenizer), "--valid_fraction", "0.4"]
    megagpt([*code, "--output", "data/code"], workplace)
    for command in rest:
        run_in(workplace, command)
    for command in starting_with("deepspeed", "torchrun", "python"):
        run_dir = workplace / command[command.index("--run_dir") + 1]
        assert (run_dir / "summary.json").exists(), run_dir


def test_the_files_of_a_run_that_the_readme_names_are_there(workplace):
    run_dir = workplace / "runs" / "gpt1"
    if not run_dir.exists():
        pytest.skip("needs the run of the test before")
    table = re.findall(r"^\| (`.*?) \| .* \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    patterns = [name.rstrip("/") for row in table for name in re.findall(r"`([^`]+)`", row)]
    assert len(patterns) >= 8
    for pattern in patterns:
        assert list(run_dir.glob(pattern)), f"{pattern} is not in the run folder"


@pytest.mark.parametrize("command", starting_with("make"), ids=shlex.join)
def test_the_readmes_make_targets_exist(command):
    subprocess.run(["make", "--dry-run", *command[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for name in re.findall(r"`((?:megagpt|ds_configs|docs|tests|kernels)/[\w./]+)`", text):
        if "<" not in name and "finetune" not in name:
            assert (ROOT / name).exists(), name


def message_parts():
    """The constant parts of every string in the package that is no docstring."""
    for path in (ROOT / "megagpt").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                yield node.value


def test_troubleshooting_quotes_messages_that_megagpt_really_has():
    ours = (ROOT / "docs/troubleshooting.md").read_text().partition("## Messages of others")[0]
    headings = re.findall(r"^### `(.*)`$", ours, flags=re.MULTILINE)
    assert len(headings) > 20
    parts = [*message_parts(), (ROOT / "slurm/common.sh").read_text()]
    for heading in headings:
        for fragment in (f.strip(": ") for f in heading.split("...") if f.strip(": ")):
            assert any(fragment in part for part in parts), f"no message has {fragment!r}"


def test_the_quickstart_takes_another_port_where_the_usual_one_is_taken():
    with socket.socket() as other_job:
        other_job.bind(("127.0.0.1", 0))
        other_job.listen()
        taken = other_job.getsockname()[1]
        flag, port = port_flag(taken).split()
        assert flag == "--master_port"
        assert int(port) != taken
    assert port_flag(taken) == ""


COMMAND_THAT_ENDS_IN_ORDER = """
import time
try:
    print("started", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("in order", flush=True)
"""


def test_ctrl_c_lets_the_command_of_a_quickstart_end_in_order():
    command = ["python", "-c", COMMAND_THAT_ENDS_IN_ORDER]
    code = f"import sys\nfrom megagpt.tools import quickstart\nsys.exit(quickstart.run({command!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal's job is
    ) as process:
        assert any(line == "started\n" for line in process.stdout)
        os.killpg(process.pid, signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    assert shown == "in order\n\ninterrupted; the same make command goes on\n"
    assert errors == ""
    assert process.returncode == 130


def test_the_quickstart_goes_from_text_to_a_sample(tmp_path):
    corpus, run_dir = tmp_path / "corpus", tmp_path / "run"
    flags = ["--steps", "4", "--corpus", str(corpus), "--run_dir", str(run_dir)]
    done = subprocess.run(
        [sys.executable, "-m", "megagpt.tools.quickstart", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("validation loss", "bits per byte", "def parse_header(line):", f"tensorboard --logdir {run_dir}"):
        assert expected in done.stdout
    assert (run_dir / "loss.png").exists()
