"""Checkpoint folders on disk: names, manifests, verification, retention. No torch, no DeepSpeed, no process group.

A checkpoint is a folder ``global_step<N>`` whose ``manifest.json`` lists every other file with its size and SHA-256.
It is written under a hidden name and gets its real one by a rename, so what has the name is whole; ``latest`` is only
a hint for other tools. Everything found damaged is left where it is: the run's owner decides.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megagpt.errors import CheckpointError

FOLDER = "checkpoints"  # inside the run folder
MANIFEST = "manifest.json"
STATE = "megagpt_state.json"  # step, samples, model, data: what a checkpoint holds beside tensors
FORMAT = 1
_TAG = re.compile(r"^global_step([0-9]{1,18})$")
_TMP = re.compile(r"^\.tmp-global_step[0-9]+$")


def tag_name(step: int) -> str:
    return f"global_step{step}"


def tmp_name(step: int) -> str:
    return f".tmp-{tag_name(step)}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name, or None for a folder that is not one."""
    match = _TAG.match(folder.name)
    return int(match[1]) if match else None


def folders(root: Path) -> list[Path]:
    """The checkpoint folders under ``root``, newest step first, intact or not; links are never followed."""
    if not root.is_dir():
        return []
    found = [p for p in root.iterdir() if step_of(p) is not None and p.is_dir() and not p.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def root_of(path: Path) -> Path:
    """Where the checkpoints of ``path`` are, a run folder or already the folder of its checkpoints."""
    return path / FOLDER if (path / FOLDER).is_dir() else path


def nothing_there(path: Path) -> CheckpointError:
    """The error of a path in which a checkpoint was looked for in vain."""
    fault = "holds no checkpoint" if path.exists() else "does not exist"
    return CheckpointError(
        f"{path} {fault}; give a run folder, a {FOLDER}/global_step* folder in one, or a .safetensors file"
    )


class Source(NamedTuple):
    """What weights on disk are of."""

    model: dict  # the settings of their model
    tokenizer_sha256: str | None  # of the text they were trained on, None where that is not known
    finetuned: bool = False  # whether they are of a decoder with a head


def read_source(path: Path) -> Source:
    """What the weights of ``path`` are of: a run folder, a checkpoint or a .safetensors file.

    Only small files are read. Raises CheckpointError when there are none.
    """
    if path.suffix == ".safetensors":
        with open_safetensors(path, framework="np") as file:
            about = file.metadata() or {}
            return Source(json.loads(about.get("config", "{}")), about.get("tokenizer_sha256"), "task" in about)
    for folder in [path] if step_of(path) is not None else folders(root_of(path)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            data = state["data"]
            return Source(state["model"], data.get("tokenizer_sha256"), "task" in data)
    raise nothing_there(path)


def read_decoder_source(path: Path) -> Source:
    """:func:`read_source` of weights without a head. Raises CheckpointError for fine-tuned ones."""
    source = read_source(path)
    if source.finetuned:
        raise CheckpointError(
            f"{path} is fine-tuned already; give the pre-trained run that it came from, or ask it with megagpt predict"
        )
    return source


@contextlib.contextmanager
def open_safetensors(path: Path, *, framework: str):
    """The open file. Raises CheckpointError for one that is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from None


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: its path inside the folder, its size in bytes and its SHA-256 in hex."""

    name: str
    size: int
    sha256: str


def hash_file(folder: Path, name: str) -> FileEntry:
    """The entry of a file that is on disk."""
    digest = hashlib.sha256()
    size = 0
    with open(folder / name, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(name, size, digest.hexdigest())


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` so that a reader sees the old content or the new, never a part of either."""
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with open(tmp, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(tmp, path)
    fsync(path.parent)


def commit(tmp: Path, final: Path, entries: Iterable[FileEntry], header: dict) -> None:
    """Write the manifest of ``tmp`` and give the folder its real name; before this call the checkpoint does not exist.

    ``header`` holds what identifies the checkpoint: step, world size, ZeRO stage, precision, model, data.
    """
    files = {e.name: {"size": e.size, "sha256": e.sha256} for e in sorted(entries, key=lambda e: e.name)}
    body = json.dumps({"format": FORMAT, **header, "files": files}, indent=1)
    with open(tmp / MANIFEST, "w", encoding="utf-8") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())
    fsync(tmp)
    os.rename(tmp, final)
    fsync(final.parent)


def read(folder: Path) -> dict:
    """The manifest of a checkpoint folder. Raises ValueError with the reason when there is no usable one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        raise ValueError(f"its {MANIFEST} lists no files")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')!r} and this version reads {FORMAT}")
    if manifest.get("step") != step_of(folder):
        raise ValueError(f"its manifest is of step {manifest.get('step')!r}")
    for name, entry in manifest["files"].items():
        escapes = os.path.isabs(name) or ".." in Path(name).parts
        if escapes or not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ValueError(f"its manifest has an impossible entry {name!r}")
    return manifest


def check_file(folder: Path, name: str, entry: dict) -> str | None:
    """What is wrong with one file against its manifest entry, or None."""
    path = folder / name
    if path.is_symlink() or not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"{name} has {size} bytes and its manifest says {entry['size']}"
    try:
        if hash_file(folder, name).sha256 != entry["sha256"]:
            return f"{name} is damaged: its SHA-256 differs from the manifest's"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def problem(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Why ``folder`` cannot be loaded, or None when every file is what its manifest says.

    With ``parts`` ranks each reads the files ``part``, ``part + parts``, ...; all of them together read all.
    """
    try:
        manifest = read(folder)
    except ValueError as error:
        return str(error)
    for name in sorted(manifest["files"])[part::parts]:
        found = check_file(folder, name, manifest["files"][name])
        if found:
            return found
    return None


def newest_intact(
    root: Path,
    problem: Callable[[Path], str | None] = problem,
    folders: Callable[[Path], list[Path]] = folders,
) -> tuple[Path | None, list[str]]:
    """The newest checkpoint under ``root`` that verifies, and one line for each newer one that does not.

    ``problem`` is how one is verified and ``folders`` how they are found. Raises CheckpointError when there are
    checkpoints and none is intact: starting again from step 0 would throw the run away.
    """
    skipped = []
    for folder in folders(root):
        reason = problem(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"skipped checkpoint {folder.name}: {reason}")
    if skipped:
        raise CheckpointError(
            f"no checkpoint under {root} is intact ({'; '.join(skipped)}); restore one from a copy, "
            "or start again with --resume never in another --run_dir"
        )
    return None, skipped


def locate(
    path: Path,
    problem: Callable[[Path], str | None] = problem,
    folders: Callable[[Path], list[Path]] = folders,
) -> tuple[Path, list[str]]:
    """The checkpoint folder meant by ``path``: itself, or the newest intact one of a run folder.

    With it one line for each newer one that was passed over. Raises CheckpointError when there is none.
    """
    if step_of(path) is not None and path.is_dir():
        reason = problem(path)
        if reason:
            raise CheckpointError(f"checkpoint {path} cannot be used: {reason}")
        return path, []
    folder, skipped = newest_intact(root_of(path), problem, folders)
    if folder is None:
        raise nothing_there(path)
    return folder, skipped


def write_latest(root: Path, step: int) -> None:
    """Point ``latest``, which DeepSpeed's own tools read, to ``step``."""
    write_atomically(root / "latest", tag_name(step))


def remove_leftovers(root: Path) -> list[Path]:
    """Delete what dead runs left half-written under ``root``; the caller holds the run folder's lock."""
    leftovers = [p for p in root.iterdir() if _TMP.match(p.name) and p.is_dir()] if root.is_dir() else []
    for folder in leftovers:
        shutil.rmtree(folder, ignore_errors=True)
    return leftovers


def prune(root: Path, keep_last: int, keep: set[int], passed_over: Iterable[int] = ()) -> list[int]:
    """Delete all checkpoints but the ``keep_last`` newest and the steps in ``keep``; the deleted steps.

    At least the two newest stay whatever ``keep_last`` says, for one of them may turn out damaged. Those
    ``passed_over`` because they are damaged are neither deleted nor counted.
    """
    deleted = []
    ours = [folder for folder in folders(root) if step_of(folder) not in passed_over]
    for folder in ours[max(2, keep_last) :]:
        step = step_of(folder)
        if step in keep:
            continue
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = root / tmp_name(step)
        with contextlib.suppress(OSError):
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
            deleted.append(step)
    return deleted
