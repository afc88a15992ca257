"""A tiny corpus for tests of training: real text (this Python's own library), a token a byte."""

import atexit
import functools
import importlib
import tempfile
from pathlib import Path

import numpy as np

from megagpt.data.writer import CorpusWriter, Counts

_SOURCES = ("json", "email", "unittest")  # packages of the standard library: some 1.2 MB of code and English


@functools.cache
def tiny_corpus() -> str:
    """The prefix of a corpus made once a test session; ``<prefix>-valid`` is a smaller one for validation."""
    temporary = tempfile.TemporaryDirectory(prefix="megagpt-corpus-")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    modules = [importlib.import_module(name) for name in _SOURCES]
    texts = [path.read_bytes() for m in modules for path in sorted(Path(m.__file__).parent.glob("*.py"))]
    write_bytes_corpus(folder / "stdlib", texts[3:])
    write_bytes_corpus(folder / "stdlib-valid", texts[:3])
    return str(folder / "stdlib")


def write_bytes_corpus(prefix: Path, texts: list[bytes], tokenizer_sha256: str = "0" * 64) -> None:
    """A corpus whose token ids are the bytes of ``texts``."""
    work = Path(f"{prefix}.work")
    work.mkdir(parents=True)
    writer = CorpusWriter(work, "part", 256)
    for text in texts:
        ids = np.frombuffer(text, np.uint8).astype(np.int64)
        counts = Counts(1, len(ids), len(text.split()), len(text), int(ids.max(initial=0)))
        writer.append(ids, np.array([len(ids)]), 0, counts)
    writer.finish(str(prefix), b"{}", tokenizer_sha256, None, {})
    writer.close()
