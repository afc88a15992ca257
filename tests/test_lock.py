"""requirements.lock: what ``make install`` takes is pinned, hashed, and what pyproject.toml asks for."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).parents[1] / "requirements.lock"
ELSEWHERE = {"torch", "triton", "megagpt"}  # whose build depends on the machine, and this project itself


def locked() -> dict[str, list[Requirement]]:
    """The pinned versions of each name, one for every kind of machine."""
    found: dict[str, list[Requirement]] = {}
    for entry in re.split(r"\n(?=\S)", LOCK.read_text().replace("\\\n", " ").strip()):
        text, *hashes = re.split(r"\s+--hash=", entry.strip())
        assert hashes, f"{text} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest.strip()) for digest in hashes), text
        pin = Requirement(text)
        (only,) = pin.specifier
        assert re.fullmatch(r"==[^*]+", str(only)), text
        found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_every_dependency_is_locked_at_a_version_that_is_asked_for(python):
    pins, machine = locked(), {"python_version": python, "python_full_version": f"{python}.9"}
    asked = [Requirement(text) for text in requires("megagpt")]
    extras = ["", "all", "data", "finetune", "plots", "eval", "serve", "dev"]
    names = set()
    for wanted in asked:
        here = any(wanted.marker is None or wanted.marker.evaluate({**machine, "extra": extra}) for extra in extras)
        name = canonicalize_name(wanted.name)
        if not here or name in ELSEWHERE:
            continue
        valid = [pin for pin in pins.get(name, []) if pin.marker is None or pin.marker.evaluate(machine)]
        assert len(valid) == 1, f"{wanted}: run make lock"
        assert wanted.specifier.contains(next(iter(valid[0].specifier)).version), f"{wanted}: run make lock"
        names.add(name)
    assert {"deepspeed", "numpy", "transformers", "pytest"} <= names
    assert not ELSEWHERE & pins.keys()


def test_what_builds_the_project_is_locked_too():
    """pip would fetch it anew for the build, whatever its version and hash are."""
    (wanted,) = re.findall(r'^requires = \["(.*)"\]$', (LOCK.parent / "pyproject.toml").read_text(), re.MULTILINE)
    (pin,) = locked()[Requirement(wanted).name]
    assert Requirement(wanted).specifier.contains(next(iter(pin.specifier)).version)
    assert "--no-build-isolation --editable" in (LOCK.parent / "Makefile").read_text()
