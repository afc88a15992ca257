"""``megagpt slurm``: the scripts it writes say what was asked for, whatever characters that holds."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import ConfigError
from megagpt.tools.slurm import script, slurm_main
from megagpt.tools.slurm_script import KINDS, render, safe_name

ROOT = Path(__file__).parent.parent
AWKWARD = [
    *("plain", "two words", " edge ", "it's", 'say "no"', "$HOME", "${x:-y}", "$(touch pwned)", "`touch pwned`", "a;b"),
    *("a&b", "a|b", "a>b", "a<b", "*", "?", "[a-z]", "{a,b}", "~", "~root", "!", "#x", "a#b", "\\", "\\n", "a\\"),
    *(
        "line\nbreak",
        "\n",
        "tab\tbed",
        "-x",
        "--",
        "-",
        "=",
        "a=b",
        "%x-%j",
        "é",
        "日本",
        "\u202e",
        "'",
        '"',
        "''\"\"",
        "EOF",
    ),
    *("EOF", "\x07bell", "\x1b[31m", "{{ home }}", "{% raw %}", "(", ")", "a\r\nb"),
]


def directives(text: str) -> dict[str, str]:
    words = [word for line in text.splitlines() if line.startswith("#SBATCH ") for word in line.split()[1:]]
    return {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}


@pytest.mark.parametrize("path", sorted(ROOT.glob("slurm/*")), ids=lambda path: path.name)
def test_shipped_scripts_are_short_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.name == "common.sh" or len(path.read_text().splitlines()) <= 40
    for name in re.findall(r"ds_configs/[\w.]+", path.read_text()):
        assert (ROOT / name).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_without_flags_the_script_is_the_shipped_one(kind):
    shipped = (ROOT / "slurm" / f"{kind}.sbatch").read_text()
    written, _ = script(["--kind", kind], "render")
    assert directives(written) == {**directives(shipped), "job-name": f"megagpt-{kind}"}
    body = shipped[shipped.rindex("#SBATCH") :].partition("\n")[2].strip()
    assert body in written
    assert len(body) > 200


def test_flags_become_options_of_sbatch():
    flags = ["--nodes", "3", "--gpus-per-node", "4", "--time", "2-12", "--partition", "long", "--array", "1-9%3"]
    more = ["--exclusive", "--mem", "0", "--sbatch", "mail-type=END", "overcommit", "--signal", "USR1@60"]
    text, _ = script([*flags, *more, "--", "--run_dir", "runs/a b"], "render")
    found = directives(text)
    expected = {"nodes": "3", "ntasks-per-node": "4", "gpus-per-node": "4", "time": "2-12", "partition": "long"}
    expected |= {
        "array": "1-9%3",
        "exclusive": "",
        "mem": "0",
        "mail-type": "END",
        "overcommit": "",
        "signal": "USR1@60",
    }
    assert {name: found[name] for name in expected} == expected
    assert found["job-name"] == "megagpt-a_b"
    assert found["cpus-per-task"] == "8"  # the shipped script's own


def run_rendered(arguments, variables, folder: Path) -> tuple[list[str], str]:
    """What the rendered script would start, and the value of the variable NOTE, from bash itself."""
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / "common.sh").write_text(
        'python=python\nrun() { printf "%s\\0" "$@" >"$MEGAGPT_HOME/argv"; printf %s "$NOTE" >"$MEGAGPT_HOME/note"; }\n'
    )
    (folder / "slurm" / "pretrain.sbatch").write_text((ROOT / "slurm/pretrain.sbatch").read_text())
    text = render("pretrain", {}, variables, arguments, folder).encode()
    subprocess.run(["bash", "-n"], input=text, check=True)
    subprocess.run(["bash"], input=text, check=True, cwd=folder)
    assert not (folder / "pwned").exists()
    argv = (folder / "argv").read_bytes().decode().split("\0")[:-1]
    assert argv[:3] == ["python", "-u", f"{folder}/train.py"]
    return argv[5:], (folder / "note").read_bytes().decode()


def test_a_container_of_pyxis_gets_the_folders_and_the_command(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "common.sh").write_text('python=python\nrun() { printf "%s\\0" "${srun_flags[@]}" "$@"; }\n')
    env = {"MEGAGPT_HOME": str(tmp_path), "SLURM_SUBMIT_DIR": "/home/me", "TMPDIR": "/local", "MOUNTS": "/data/books"}
    image = "docker://ghcr.io#acme/megagpt:1.0"
    script = ROOT / "slurm/container.sbatch"
    argv = subprocess.check_output(["bash", script, "--run_dir", "x"], env={**os.environ, **env, "IMAGE": image})
    mounts = f"{tmp_path}:{tmp_path},/home/me:/home/me,/local:/local,/data/books:/data/books"
    assert argv.decode().split("\0")[:6] == [
        *(f"--container-image={image}", "--container-workdir=/home/me", f"--container-mounts={mounts}"),
        *("python", "-u", f"{tmp_path}/train.py"),
    ]


@pytest.mark.parametrize(
    ("script", "chosen", "command"),
    [
        ("pretrain", {}, ["warm"]),
        ("finetune", {}, ["finetune", "warm"]),
        ("array", {}, ["warm"]),
        ("array", {"SCRIPT": "finetune.py"}, ["finetune", "warm"]),
        ("container", {"IMAGE": "megagpt.sif"}, ["warm"]),
    ],
    ids=["pretrain", "finetune", "array", "array of finetune.py", "container"],
)
def test_caches_are_filled_with_the_flags_of_the_run(script, chosen, command, tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "common.sh").write_text(
        'python=python\nvalue_of() { run_dir=runs/x; }\nrun() { printf "%s\\0" "${warm[@]}" -- "$@"; }\n'
    )
    env = {"MEGAGPT_HOME": str(tmp_path), "SLURM_SUBMIT_DIR": "/home/me", "SLURM_ARRAY_TASK_ID": "3", **chosen}
    words = ["bash", ROOT / f"slurm/{script}.sbatch", "--run_dir", "runs/x", "--lr", "1e-3"]
    output = subprocess.check_output(words, env={**os.environ, **env}).decode()
    told = output.rpartition("\n")[2].split("\0")[:-1]  # an array says first which run this is
    warm, run = told[: told.index("--")], told[told.index("--") + 1 :]
    assert warm[: 3 + len(command)] == ["python", "-m", "megagpt", *command]
    assert warm[3 + len(command) :] == run[3:]
    assert run[:3] == ["python", "-u", f"{tmp_path}/{'finetune' if command[0] == 'finetune' else 'train'}.py"]


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_arguments_and_variables_arrive_as_they_were_typed(text, tmp_path):
    arguments = ["--run_dir", text, f"--data={text}", text]
    assert run_rendered(arguments, {"NOTE": text}, tmp_path) == (arguments, text)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_any_arguments_are_one_line_of_bash(arguments):
    text = render("pretrain", {}, {}, arguments)
    told = text.partition("set -- ")[2].partition(' "$@"\n')[0] if arguments else ""
    assert shlex.split(told) == arguments


@given(st.text())
def test_any_name_is_a_harmless_name_of_a_job(text):
    assert safe_name(text)[0] not in "-."
    assert directives(render("pretrain", {"job-name": safe_name(text)}, {}, []))["job-name"] == safe_name(text)


@pytest.mark.parametrize("value", ["a b", "x\n#SBATCH --wrap=true", "$(x)", "`x`", "", "a#b", "a'b", "a;b"])
def test_no_value_breaks_out_of_its_directive(value):
    with pytest.raises(ConfigError, match="cannot stand in a batch script"):
        render("pretrain", {"partition": value}, {}, [])


def test_other_mistakes_are_told_in_a_sentence(tmp_path, monkeypatch):
    for words, message in (
        (["render", "--set", "IMAGE"], "is not NAME=VALUE"),
        (["render", "--set", "a-b=c"], "no name of a variable"),
        (["render", "--", "a\0b"], "NUL"),
        (["rendr"], "did you mean 'render'"),
        (["status", str(tmp_path / "none")], "no folder of a run"),
    ):
        with pytest.raises(ConfigError, match=message):
            slurm_main(words)
    with pytest.raises(ConfigError, match="part of the repository"):
        render("pretrain", {}, {}, [], tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on the PATH"):
        slurm_main(["submit"])


def test_a_dry_run_shows_the_script_and_submits_nothing(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert slurm_main(["submit", "--dry_run", "--nodes", "2", "--", "--run_dir", "runs/x"]) == 0
    assert capsys.readouterr().out == script(["--nodes", "2", "--", "--run_dir", "runs/x"], "render")[0]


def test_the_status_of_a_run_tells_how_far_it_is(tmp_path, capsys):
    run = {"schedule": {"total": 5000}, "starts": [{}, {}]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    records = [{"step": 1190, "loss": 3.3}, {"step": 1200, "loss": 3.25}, {"step": 1200, "valid/books/loss": 3.4}]
    log = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 12'
    (tmp_path / "metrics.jsonl").write_text(log)
    assert slurm_main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: step 1,200 of 5,000, loss 3.2500, 2 starts\n"
