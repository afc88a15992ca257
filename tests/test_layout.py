"""Imports point one way: what each part of the project may know, read from the source and not from running it."""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("megagpt/**/*.py")) + sorted(ROOT.glob("kernels/megagpt_kernels/**/*.py"))

# What a part may import of the project besides itself, errors and version. A dotted name is one module of a part.
MAY_IMPORT = {
    "__init__": set(),
    "errors": set(),
    "version": set(),
    "secrets": set(),
    "config": set(),
    "dist": {"secrets"},
    "data": set(),
    "data.main": {"data", "config.flags", "dist"},
    "ops": {"megagpt_kernels"},
    "model": {"ops"},
    "train": {"secrets", "model", "data", "ops", "config", "dist", "evaluate.perplexity"},
    "train.zeroshot": {"train", "config", "data", "zeroshot"},  # tasks on the way of a run
    "evaluate": {"model", "data", "ops", "config", "dist", "train.checkpoint", "train.manifest", "train.weights"},
    "tools": {"model", "data", "ops", "config", "dist"},
    "tools.doctor_packages": {"tools", "model", "ops", "config", "train.engine"},  # which asks DeepSpeed
    "finetune": {"model", "data", "ops", "config", "dist", "train", "evaluate.source"},
    "finetune.study": {"finetune", "config", "tools.slurm_script"},  # whose runs a batch script may make
    "export": {"model", "data", "ops", "config", "finetune", "evaluate.source", "train.manifest", "train.weights"},
    "serve": {"model", "data", "config", "evaluate"},
    "zeroshot": {"data", "config", "dist", "evaluate", "finetune", "train.manifest"},
    "cli": {"dist"},
    "__main__": {"cli"},
    "megagpt_kernels": set(),
}
# The parts that must answer before anything heavy is loaded, and the packages they may load inside a function.
LIGHT = {
    "__init__": set(),
    "errors": set(),
    "version": set(),
    "secrets": set(),
    "cli": set(),
    "config": {"tyro", "hjson"},
    "dist": {"torch"},
}
# Packages that belong to one place.
OWNERS = {
    "deepspeed": {f"megagpt.train.{name}" for name in ("engine", "checkpoint", "safe", "reshard")},
    "megagpt_kernels": {"megagpt.ops.triton_ops"},
    "triton": {"megagpt_kernels"},
    "apex": {"megagpt.train.optim"},
}


class Import(NamedTuple):
    module: str  # that imports, megagpt.train.loop
    target: str  # that is imported, megagpt.dist.everywhere
    lazy: bool  # inside a function

    @property
    def part(self) -> str:
        return part_of(self.module)


def part_of(name):
    """The part of the project that a dotted name belongs to, by the rule that names it most exactly."""
    first, *rest = name.split(".")
    if first != "megagpt":
        return first
    module = ".".join(rest[:2])
    return module if module in MAY_IMPORT else (rest or ["__init__"])[0]


def module_name(path):
    parts = path.relative_to(ROOT if path.is_relative_to(ROOT / "megagpt") else ROOT / "kernels").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Every import statement of a file, wherever it stands; ``from a import b`` is a.b."""
    module = module_name(path)

    def walk(node, lazy):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(module, alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno} imports relatively; write the whole name"
                yield from (Import(module, f"{child.module}.{alias.name}", lazy) for alias in child.names)
            else:
                yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def inside(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def test_every_part_has_its_rule():
    assert {part_of(module_name(path)) for path in SOURCES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_it_may_know(part):
    allowed = [part, *MAY_IMPORT[part], "errors", "version"]
    for found in IMPORTS:
        if found.part != part or found.target.split(".")[0] not in ("megagpt", "megagpt_kernels"):
            continue
        target = found.target.removeprefix("megagpt.")
        if target in ("megagpt", "megagpt.__version__"):
            continue
        assert any(inside(target, name) for name in allowed), f"{found.module} imports {found.target}"


@pytest.mark.parametrize("part", LIGHT)
def test_what_must_answer_at_once_loads_nothing_heavy(part):
    for found in IMPORTS:
        top = found.target.split(".")[0]
        if found.part != part or top in sys.stdlib_module_names or top == "megagpt":
            continue
        assert top in LIGHT[part], f"{found.module} imports {found.target}"
        assert found.lazy, f"{found.module} imports {found.target} outside a function"


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_with_an_owner_is_imported_by_it_alone(package):
    for found in IMPORTS:
        if found.target.split(".")[0] == package and not inside(found.module, package):
            assert any(inside(found.module, owner) for owner in OWNERS[package]), f"{found.module} imports {package}"
            assert found.lazy or package == "triton", f"{found.module} imports {package} outside a function"


def test_kernels_know_torch_and_triton_alone():
    for found in IMPORTS:
        if found.part == "megagpt_kernels":
            top = found.target.split(".")[0]
            assert top in {"torch", "triton", "megagpt_kernels"} or top in sys.stdlib_module_names, found


def test_nothing_is_pickled_and_weights_are_loaded_as_data():
    for found in IMPORTS:
        assert found.target.split(".")[0] not in {"cPickle", "dill", "cloudpickle", "shelve", "marshal"}, found
        assert not found.target.startswith("pickle."), found
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert not re.fullmatch(r"\w+_object(_list)?", node.attr), f"{path}:{node.lineno}: {node.attr} pickles"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr.endswith("Error"), f"{path}:{node.lineno}: pickle.{node.attr}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{path}:{node.lineno}: torch.load without weights_only"


def test_entry_scripts_only_call_a_main():
    for script in ROOT.glob("*.py"):
        code = script.read_text(encoding="utf-8")
        assert len(code.splitlines()) <= 15, script
        targets = [node.module for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
        assert targets, script
        assert all(target.startswith("megagpt.") and target.endswith(".main") for target in targets), script


def test_the_folder_of_the_kernels_is_no_package():
    """Launchers put the repository's root on sys.path: a package `kernels` would hide the one of that name on PyPI."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
