"""The embedded task: from a docstring of Python's standard library to the package it belongs to.

Training and validation share no module, so an answer cannot be had from a neighbour in the same file.
"""

import ast
import json
import os
import random
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megagpt.data import stdlib_corpus
from megagpt.errors import DataError

N_CLASSES = 10  # packages, those with the most docstrings
MIN_WORDS = 6  # a shorter docstring says too little
MAX_CHARS = 1000  # of a docstring, cut at a word
VALID_SHARE = 0.2  # of each package's docstrings, by whole modules
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Docstring(NamedTuple):
    text: str
    package: str
    module: str  # file below the library's folder


def write_task(folder: Path, seed: int = 0) -> dict[str, int]:
    """Write ``train.jsonl`` and ``valid.jsonl`` of {text, label, module} into ``folder``; the number of lines of each.

    Raises DataError where this Python has no sources of its standard library.
    """
    train, valid = split(collect(), seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("valid", valid)):
        lines = (json.dumps({"text": d.text, "label": d.package, "module": d.module}) + "\n" for d in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"train": len(train), "valid": len(valid)}


def collect() -> list[Docstring]:
    """The docstrings of the ``N_CLASSES`` packages that have most of them; each text once, in the order of files."""
    root = sysconfig.get_paths()["stdlib"]
    seen: set[str] = set()
    found = []
    for path in stdlib_corpus.files():
        module = os.path.relpath(path, root).replace(os.sep, "/")
        if "/" not in module:
            continue  # a module of its own, no package
        for text in _docstrings(path):
            if text not in seen:
                seen.add(text)
                found.append(Docstring(text, module.split("/")[0], module))
    counts = Counter(d.package for d in found)
    modules = {package: len({d.module for d in found if d.package == package}) for package in counts}
    chosen = [package for package, _ in counts.most_common() if modules[package] > 1][:N_CLASSES]
    if len(chosen) < 2:
        raise DataError(f"{root} has docstrings of fewer than two packages; give --train and --valid files instead")
    return [d for d in found if d.package in chosen]


def split(docstrings: list[Docstring], seed: int = 0) -> tuple[list[Docstring], list[Docstring]]:
    """Training and validation part: of each package, whole modules up to ``VALID_SHARE`` of its docstrings.

    Every package keeps modules in both parts.
    """
    held: set[str] = set()
    rng = random.Random(seed)
    for _, modules in sorted(_by_module(docstrings).items()):
        order = sorted(modules)
        rng.shuffle(order)
        smallest = min(order, key=modules.__getitem__)
        taken = {smallest: modules[smallest]}  # at least one
        for module in order:
            if module not in taken and sum(taken.values()) + modules[module] <= VALID_SHARE * sum(modules.values()):
                taken[module] = modules[module]
        held |= set(taken)
    return [d for d in docstrings if d.module not in held], [d for d in docstrings if d.module in held]


def _by_module(docstrings: list[Docstring]) -> dict[str, Counter]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for d in docstrings:
        counts[d.package][d.module] += 1
    return counts


def _docstrings(path: str) -> Iterator[str]:
    """The docstrings of a source file that say something, white space reduced to single spaces."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old sources
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return  # some sources are templates
    for node in ast.walk(tree):
        if not isinstance(node, _DOCUMENTED):
            continue
        text = " ".join((ast.get_docstring(node) or "").split())
        if text.count(" ") + 1 >= MIN_WORDS:
            yield text if len(text) <= MAX_CHARS else text[:MAX_CHARS].rsplit(" ", 1)[0]
