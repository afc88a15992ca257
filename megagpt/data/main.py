"""The commands on data: ``megagpt prepare`` and ``megagpt data info|verify|merge``."""

from dataclasses import dataclass
from pathlib import Path

from megagpt import dist
from megagpt.config.flags import parse_flags
from megagpt.data.info import CorpusInfo
from megagpt.data.prepare import PrepareSettings, prepare
from megagpt.errors import ConfigError, nearest


def prepare_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt prepare``; the process's exit code."""
    return dist.run_main(lambda: _prepare(parse_flags(PrepareSettings, argv, prog="megagpt prepare")))


def _prepare(settings: PrepareSettings) -> None:
    infos = prepare(settings)
    for info in infos:
        print(_summary(info))


def _summary(info: CorpusInfo) -> str:
    return f"{info.n_documents:,} documents, {info.n_tokens:,} tokens"


def data_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt data``; the process's exit code."""
    raise NotImplementedError
