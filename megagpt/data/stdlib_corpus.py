"""The embedded corpus: the standard library that every Python carries, each module a document of code and English."""

import os
import sysconfig
from pathlib import Path

from megagpt.errors import DataError

NAME = "python-stdlib"
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def files() -> list[str]:
    """The source files of the running Python's standard library, by name; no tests, no installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, modules in os.walk(root):
        names[:] = sorted(name for name in names if name not in _LEFT_OUT and not name.startswith("config-"))
        found += [os.path.join(folder, module) for module in modules if module.endswith(".py")]
    if not found:
        raise DataError(f"this Python has no sources of its standard library in {root}; give --input instead")
    return sorted(found)


def bytes_corpus(prefix: Path, package: str = "email") -> None:
    """A corpus of one package of the library, a token a byte: for runs that have to be made and not to be good."""
    import numpy as np

    from megagpt.data.writer import CorpusWriter, Counts

    work = Path(f"{prefix}.work")
    work.mkdir(parents=True)
    writer = CorpusWriter(work, "part", 256)
    for name in files():
        if f"{os.sep}{package}{os.sep}" in name:
            text = Path(name).read_bytes()
            ids = np.frombuffer(text, np.uint8).astype(np.int64)
            counts = Counts(1, len(ids), len(text.split()), len(text), int(ids.max(initial=0)))
            writer.append(ids, np.array([len(ids)]), 0, counts)
    writer.finish(str(prefix), b"{}", "0" * 64, None, {})
    writer.close()
