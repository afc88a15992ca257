"""Random inputs to everything that reads a stranger's file: ``make fuzz N=20000``.

Each target (tests/fuzz_targets.py) runs in a process of its own, which fails on an exception that is not meant for the
user, on an input that takes ten seconds, and on a gigabyte of memory more than the process began with. Inputs are
chosen by atheris, which follows what the code does with them, where that is installed (x86-64 Linux), else by
hypothesis. ``--engine`` asks for one of them; hypothesis begins with ``--seed``.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SECONDS = 10  # an input may take
BYTES = 1 << 30  # of memory, beyond what the process has before the first input
_LONGEST = 1 << 17  # bytes of an input


class TooSlow(BaseException):
    """No Exception: no reader may catch it."""


@contextlib.contextmanager
def limited():
    """Inside, the process may take a gigabyte more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def in_time(check, data: bytes) -> bool:
    """``check(data)``. Raises TooSlow after :data:`SECONDS`."""

    def late(number, frame):
        raise TooSlow(f"an input of {len(data)} bytes took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return check(data)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_hypothesis(target, count: int, seed: int | None = None) -> Counter:
    """``count`` inputs of hypothesis; how many were accepted and refused. ``seed`` None: the same at every run."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    told = Counter()
    quick = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    @quick
    @given(target.inputs())
    def check(data: bytes) -> None:
        told["accepted" if in_time(target.check, data) else "refused"] += 1

    with limited():
        (check if seed is None else seeded(seed)(check))()
    return told


def run_atheris(make, home: Path, count: int, seed: int) -> None:
    """``count`` inputs of libFuzzer, which ends this process: with code 0, or with the defect and its input."""
    import random

    import atheris

    with atheris.instrument_imports(include=["megagpt"]):
        target = make(home / "files")
    corpus, dictionary = home / "corpus", home / "words.dict"
    corpus.mkdir()
    for i, data in enumerate(target.seeds):
        (corpus / f"seed{i}").write_bytes(data)
    short = [word for word in target.words if len(word) <= 64]
    lines = ("".join(f"\\x{byte:02x}" for byte in word) for word in short)
    dictionary.write_text("".join(f'"{line}"\n' for line in lines))

    def mutate(data: bytes, most: int, number: int) -> bytes:
        """A word or a piece of a good input put into ``data``, or libFuzzer's own change of bytes."""
        rng = random.Random(number)
        if rng.random() < 0.5:
            return atheris.Mutate(data, most)
        at, end = sorted(rng.randint(0, len(data)) for _ in range(2))
        piece = rng.choice(target.words) if rng.random() < 0.5 else rng.choice(target.seeds)[at:end]
        return (data[:at] + piece + data[min(end, at + rng.randint(0, 16)) :])[:most]

    def check(data: bytes) -> None:
        target.check(data)

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    limit = (pages * resource.getpagesize() + BYTES) >> 20
    options = [f"-runs={count}", f"-seed={seed}", f"-timeout={SECONDS}", f"-rss_limit_mb={limit}"]
    options += [f"-max_len={_LONGEST}", f"-dict={dictionary}", f"-artifact_prefix={home}/", "-print_final_stats=1"]
    atheris.Setup(["fuzz", *options, str(corpus)], check, custom_mutator=mutate)
    atheris.Fuzz()


def child(name: str, count: int, engine: str, seed: int) -> None:
    """One target, in this process."""
    home = Path(tempfile.mkdtemp(prefix=f"megagpt-fuzz-{name}-"))
    (home / "files").mkdir()
    if engine == "atheris":
        import fuzz_targets

        run_atheris(fuzz_targets.TARGETS[name], home, count, seed)
        return
    import fuzz_targets

    told = run_hypothesis(fuzz_targets.TARGETS[name](home / "files"), count, seed)
    print(f"inputs: {told.total()} accepted: {told['accepted']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000, help="inputs for each target")
    parser.add_argument("--engine", choices=["atheris", "hypothesis"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="names of targets, a,b")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    engine = flags.engine or ("atheris" if importlib.util.find_spec("atheris") else "hypothesis")
    if flags.child:
        child(flags.child, flags.count, engine, flags.seed)
        return 0
    import fuzz_targets

    failed = []
    for name in flags.only.split(",") if flags.only else fuzz_targets.TARGETS:
        begun = time.monotonic()
        command = [sys.executable, __file__, "--child", name, "--count", str(flags.count), "--engine", engine]
        command += ["--seed", str(flags.seed)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ})
        output = done.stdout + done.stderr
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        inputs = re.search(r"(?:inputs|number_of_executed_units): +(\d+)", output)
        verdict = "ok" if done.returncode == 0 and inputs else f"FAILED ({done.returncode})"
        print(
            f"{name:10} {engine}: {inputs[1] if inputs else '?'} inputs, {time.monotonic() - begun:.0f} s, "
            f"at most {peak:.0f} MB so far: {verdict}",
            flush=True,
        )
        if verdict != "ok":
            failed.append(name)
            log = Path(tempfile.gettempdir(), f"megagpt-fuzz-{name}.log")
            log.write_text(output)
            at = output.find("Traceback")
            print(output[at : at + 4000] if at >= 0 else output[-4000:], f"all of it: {log}", sep="\n", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
