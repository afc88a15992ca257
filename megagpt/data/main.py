"""The commands on data: ``megagpt prepare`` and ``megagpt data info|verify|merge``."""

import sys
from dataclasses import dataclass

from tyro.conf import Positional

from megagpt import dist
from megagpt.config.flags import parse_flags
from megagpt.data.bpe import parse_training
from megagpt.data.info import CorpusInfo
from megagpt.data.manage import describe, merge, parts_of, verify
from megagpt.data.prepare import PrepareSettings, prepare
from megagpt.errors import ConfigError, nearest


@dataclass(frozen=True)
class Corpora:
    """Describe corpora, or verify all of their bytes."""

    prefix: Positional[tuple[str, ...]] = ()
    """prefixes of corpora, as in data/books"""


@dataclass(frozen=True)
class Merging:
    """Join corpora of one tokenizer: those named, or all shards OUTPUT-i-of-n."""

    output: str
    """prefix of the joined corpus"""
    prefix: Positional[tuple[str, ...]] = ()
    """prefixes of the corpora to join, in this order"""
    overwrite: bool = False
    """replace an existing corpus of the same name"""


# Megatron-LM's names; a document always ends with the end-of-text token where the vocabulary has one.
_MEGATRON = {"json_keys": "json_key", "output_prefix": "output"}
_BARE = {"append_eod": None}


def prepare_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt prepare``; the process's exit code."""
    return dist.run_main(
        lambda: _prepare(parse_flags(PrepareSettings, argv, prog="megagpt prepare", aliases=_MEGATRON, bare=_BARE))
    )


def _prepare(settings: PrepareSettings) -> None:
    for prefix, info in prepare(settings).items():
        print(_line(prefix, info))
    training = parse_training(settings.tokenizer)
    if training and info.vocab_size < training.vocab_size:
        print(f"the text gave no more than {info.vocab_size:,} tokens, of the {training.vocab_size:,} asked for")
    for reason, n in info.settings["skipped"].items():
        print(f"skipped: {n:,} {reason}")
    for example in info.settings["skipped_examples"]:
        print(f"  {example}")


def _line(prefix: str, info: CorpusInfo) -> str:
    return (
        f"{prefix}: {info.n_documents:,} documents, {info.n_words:,} words, {info.n_bytes:,} bytes, "
        f"{info.n_tokens:,} tokens ({info.n_bytes / max(info.n_tokens, 1):.2f} bytes each) of a vocabulary of "
        f"{info.vocab_size:,}"
    )


def data_main(argv: list[str] | None = None) -> int:
    """Run ``megagpt data``; the process's exit code."""
    return dist.run_main(lambda: _data(sys.argv[1:] if argv is None else argv))


def _data(argv: list[str]) -> None:
    commands = {"info": _info, "verify": _verify, "merge": _merge}
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: megagpt data info|verify PREFIX..., or megagpt data merge --output PREFIX [PREFIX...]")
        return
    if argv[0] not in commands:
        raise ConfigError(f"unknown command {argv[0][:80]!r}{nearest(argv[0][:80], commands)}; see megagpt data --help")
    commands[argv[0]](argv[1:])


def _prefixes(argv: list[str], command: str) -> tuple[str, ...]:
    prefixes = parse_flags(Corpora, argv, prog=f"megagpt data {command}").prefix
    if not prefixes:
        raise ConfigError(f"megagpt data {command} needs the prefix of a corpus, as in data/books")
    return prefixes


def _info(argv: list[str]) -> None:
    for prefix in _prefixes(argv, "info"):
        print(prefix)
        for name, value in describe(prefix):
            print(f"  {name:<14}{value}")


def _verify(argv: list[str]) -> None:
    for prefix in _prefixes(argv, "verify"):
        print(f"{prefix}: {verify(prefix)}", flush=True)


def _merge(argv: list[str]) -> None:
    settings = parse_flags(Merging, argv, prog="megagpt data merge")
    prefixes = list(settings.prefix) or parts_of(settings.output)
    print(_line(settings.output, merge(prefixes, settings.output, overwrite=settings.overwrite)))
