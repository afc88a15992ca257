"""What a check of ``megagpt doctor`` found."""

from dataclasses import dataclass

LEVELS = ("ok", "warning", "error")  # by exit code


@dataclass(frozen=True)
class Finding:
    """One line of the screen."""

    name: str
    found: str
    level: str = "ok"  # one of LEVELS
    meaning: str = ""  # for the user's runs
    way_out: str = ""


def warning(name: str, found: str, meaning: str, way_out: str) -> Finding:
    """A finding that makes runs slower or offers less than could be."""
    return Finding(name, found, "warning", meaning, way_out)


def error(name: str, found: str, meaning: str, way_out: str) -> Finding:
    """A finding with which runs fail."""
    return Finding(name, found, "error", meaning, way_out)


def size(n: float) -> str:
    """``n`` bytes for people."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if n >= unit:
            return f"{n / unit:,.1f} {name}"
    return f"{n:,.0f} bytes"
