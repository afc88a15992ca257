"""``megagpt selftest resume``: the user's own proof that a killed run loses nothing, with his own settings.

One run is left alone. Another one with the same flags is killed (-9) in the middle of a save, and started again. What
both have logged and what is in their last checkpoints has to be the same, bit for bit.
"""

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.config.fields import ALIASES
from megagpt.config.flags import parse_flags
from megagpt.errors import ConfigError, NumericError, nearest
from megagpt.train import faults, manifest, metrics, restarts

_HOME = Path(__file__).resolve().parent.parent.parent
_OWN = {"ds_config", "run_dir", "resume", "max_steps", "max_tokens", "epochs"}
_OWN |= {"save_interval", "keep_last", "log_interval"}
_SHARED = {"mirror"}  # the second run would go on from the first one's checkpoints there
_KILLED = 137
# What a log line says of how fast the machine was, which no two runs share.
_MEASURED = {"tokens_per_s", "step_ms", "data_ms", "memory_gb", "rank_ms", "tflops_per_gpu", "mfu"}


@dataclass(frozen=True)
class SelftestSettings:
    """Is a run that is killed and resumed the one that was not? megagpt selftest resume --ds_config FILE -- FLAGS

    The flags behind -- are those of train.py: model, corpus, kernels. Without them a small model is trained on text
    that is part of MegaGPT.
    """

    ds_config: str  # DeepSpeed's settings, as for train.py
    num_gpus: int | None = None  # ranks: one a GPU, two on a host without
    steps: int = 9  # of each run; checkpoints follow the first and the second third, and the kill hits the second one
    run_dir: str | None = None  # a new folder for both runs, which stays; without it a temporary one


def selftest_main(argv: Sequence[str]) -> int:
    """Run ``megagpt selftest``; 0 where both runs agree, else the exit code of a run that failed for its own reasons.

    Raises NumericError where they differ, ConfigError for flags that cannot be.
    """
    kind, *rest = list(argv) or ["--help"]
    own, passed = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else (rest, [])
    if kind in ("-h", "--help"):
        parse_flags(SelftestSettings, ["--help"], prog="megagpt selftest resume")
    if kind != "resume":
        raise ConfigError(f"selftest {kind[:80]!r} is unknown{nearest(kind[:80], ['resume'])}; there is: resume")
    settings = parse_flags(SelftestSettings, own, prog="megagpt selftest resume")
    names = {word[2:].partition("=")[0].replace("-", "_") for word in passed if word.startswith("--")}
    names = {ALIASES.get(name, name) for name in names}
    if taken := sorted(names & _OWN):
        raise ConfigError(f"--{taken[0]} after -- is what the test itself sets; give --ds_config, --steps, --run_dir")
    if shared := sorted(names & _SHARED):
        raise ConfigError(f"--{shared[0]} after -- would be one folder for both runs of the test; leave it out")
    if settings.steps < 3:
        raise ConfigError(f"--steps {settings.steps} leaves no step between two checkpoints; give 3 or more")
    with _folder(settings.run_dir) as home:
        return _compare_runs(settings, passed, names, home)


@contextlib.contextmanager
def _folder(run_dir: str | None) -> Iterator[Path]:
    if run_dir is None:
        with tempfile.TemporaryDirectory(prefix="megagpt-selftest-") as home:
            yield Path(home)
        return
    home = Path(run_dir)
    if home.exists() and not (home.is_dir() and not any(home.iterdir())):
        raise ConfigError(f"{home} is not empty, and a test that goes on from what is there tests nothing; remove it")
    home.mkdir(parents=True, exist_ok=True)
    yield home


def _compare_runs(settings: SelftestSettings, passed: Sequence[str], names: set[str], home: Path) -> int:
    ranks, third = settings.num_gpus or _gpus() or 2, settings.steps // 3
    command = [sys.executable, "-m", "megagpt", "launch", "--num_gpus", str(ranks), str(_HOME / "train.py")]
    command += ["--ds_config", settings.ds_config, *_defaults(names, home), *passed]
    command += ["--max_steps", str(settings.steps), "--save_interval", str(third), "--log_interval", "1"]
    command += ["--keep_last", "9", *(["--deterministic"] if _gpus() else []), "--run_dir"]
    whole, killed = home / "uninterrupted", home / "killed"
    # Its shards of the second checkpoint are written and the checkpoint is not there yet.
    fault = {faults.VARIABLE: f"shards_written:{ranks - 1}:2"}
    starts = [
        ("1/3: the run that is left alone", whole, {}, 0),
        (f"2/3: killed (-9, rank {ranks - 1}) in the save of step {2 * third}", killed, fault, _KILLED),
        (f"3/3: started again, to go on from step {third}", killed, {}, 0),
    ]
    for title, run_dir, env, expected in starts:
        print(f"\n[{title}]\n$ {shlex.join([*command, str(run_dir)])}", flush=True)
        code = subprocess.run([*command, str(run_dir)], env={**os.environ, **env}).returncode
        if code != expected:
            print(f"this start has ended with code {code} instead of {expected}; its own output says why", flush=True)
            return code or 1
    _check_went_on(killed, third)
    _compare_logs(metrics.read(whole / metrics.NAME), metrics.read(killed / metrics.NAME), settings.steps)
    last = Path(manifest.FOLDER, manifest.tag_name(settings.steps))
    n = _compare_checkpoints(whole / last, killed / last)
    print(
        f"\nresume is exact on {ranks} rank{'s' * (ranks > 1)}: {settings.steps} steps, and {n} tensors of the last "
        "checkpoint, are those of the uninterrupted run, bit for bit"
    )
    return 0


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _defaults(names: set[str], home: Path) -> list[str]:
    """A small model and a small corpus, where the flags name none."""
    flags = [] if "model" in names else ["--model", "tiny", "--n_layer", "2", "--seq_len", "128"]
    if "data" not in names:
        from megagpt.data.stdlib_corpus import bytes_corpus

        bytes_corpus(home / "text")
        flags += ["--data", str(home / "text")]
    return flags


def _check_went_on(run_dir: Path, step: int) -> None:
    """Raise NumericError where the second start has begun elsewhere than at the checkpoint before the kill."""
    began = [start.get("step") for start in restarts.read(run_dir)]
    if began != [0, step]:
        raise NumericError(f"the starts of {run_dir} began at steps {began} and not at 0 and {step}: see its output")


def _compare_logs(ours: list[dict], theirs: list[dict], steps: int) -> None:
    """Raise NumericError at the first step whose figures differ, or that is there twice or not at all."""
    for name, log in (("uninterrupted", ours), ("killed", theirs)):
        found = [record["step"] for record in log if "loss" in record]
        if found != list(range(1, steps + 1)):
            raise NumericError(f"the log of the {name} run has steps {found} and not 1 to {steps}, each once")
    for a, b in zip(ours, theirs, strict=True):
        differing = [key for key in a.keys() | b.keys() if key not in _MEASURED and a.get(key) != b.get(key)]
        if differing:
            key = min(differing)
            raise NumericError(
                f"step {a['step']}: {key} is {a.get(key)} in the uninterrupted run and {b.get(key)} in the one that "
                "was killed and resumed: it does not go on exactly with these settings"
            )


def _compare_checkpoints(ours: Path, theirs: Path) -> int:
    """How many tensors two checkpoints hold. Raises NumericError where one differs in a bit."""
    a, b = _tensors(ours), _tensors(theirs)
    differing = sorted(
        {*(a.keys() ^ b.keys()), *(name for name in a.keys() & b.keys() if not _equal(a[name], b[name]))}
    )
    if differing:
        shown = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        raise NumericError(f"{len(differing)} tensors of the last checkpoint differ where the logs agree: {shown}")
    return len(a)


def _tensors(folder: Path) -> dict:
    """Every tensor of every shard, random states among them, by file and place; read from disk when they are used."""
    import torch

    from megagpt.train.safe import allow_checkpoint_classes

    allow_checkpoint_classes()
    found = {}

    def walk(place: str, value) -> None:
        if torch.is_tensor(value):
            found[place] = value
        elif isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{place}/{key}", part)

    for path in sorted(folder.glob("*.pt")):
        walk(path.name, torch.load(path, weights_only=True, map_location="cpu", mmap=True))
    return found


def _equal(a, b) -> bool:
    """Whether two tensors have the same bits; NaN is not equal to itself, and its bits are."""
    import torch

    def bits(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
