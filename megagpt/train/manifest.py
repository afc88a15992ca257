"""Checkpoint folders on disk: names, manifests, verification. No torch, no DeepSpeed, no process group.

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

from megagpt.data import storage
from megagpt.errors import CheckpointError
from megagpt.model.tensors import open_safetensors, refuse_pickles
from megagpt.train import faults

FOLDER = "checkpoints"  # inside the run folder
KEPT_WEIGHTS = "weights"  # beside it: the weights alone of checkpoints that may be gone
MANIFEST = "manifest.json"
STATE = "megagpt_state.json"  # step, samples, model, data: what a checkpoint holds beside tensors
LATEST = "latest"
WEIGHTS = "model.safetensors"  # of a fine-tuned run, and of an imported model
FOREIGN = "config.json"  # in a folder of Hugging Face's form
RELEASED = "params_shapes.json"  # in one with OpenAI's GPT-1
FORMAT = 2  # 1 had no hash of the manifest itself
_MOST_BYTES = 1 << 26  # of a manifest: more was not written by us
_TAG = re.compile(r"^global_step(0|[1-9][0-9]{0,17})$")


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


def weights_path(path: Path) -> Path:
    """Where the weights of ``path`` are: the model.safetensors of a folder that has one, otherwise ``path`` itself.

    Raises CheckpointError for a folder of others, which has to be imported.
    """
    foreign = {FOREIGN: "is a model in Hugging Face's form", RELEASED: "is a model as OpenAI released GPT-1"}
    for name, fault in foreign.items():
        if (path / name).is_file():
            raise CheckpointError(
                f"{path} {fault}; make it one of MegaGPT's first: megagpt import --from {path} --to FOLDER"
            )
    return path / WEIGHTS if (path / WEIGHTS).is_file() else path


def nothing_there(path: Path) -> CheckpointError:
    """The error of a path in which a checkpoint was looked for in vain. Raises that of pickles where there are some."""
    if step_of(path) is None:
        refuse_pickles(path)
    fault = "holds no checkpoint" if path.exists() else "does not exist"
    named = step_of(path) is not None and not path.exists()
    beside = ", ".join(folder.name for folder in folders(path.parent)[:9]) if named else ""
    wanted = f"one of {beside}" if beside else f"a {FOLDER}/global_step* folder in one, or a .safetensors file"
    return CheckpointError(f"{path} {fault}; give a run folder, {'or ' * bool(beside)}{wanted}")


class Source(NamedTuple):
    """What weights on disk are of."""

    model: dict  # the settings of their model
    tokenizer_sha256: str | None  # of the text they were trained on, None where that is not known
    finetuned: bool = False  # whether they are of a decoder with a head


def read_source(path: Path) -> Source:
    """What the weights of ``path`` are of: a run folder, a checkpoint, a .safetensors file or a folder with one.

    Only small files are read. Raises CheckpointError when there are none.
    """
    path = weights_path(path)
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


def check_size(n_params: int, path: Path, n_bytes: int) -> None:
    """Raise CheckpointError where a file of ``n_bytes`` cannot hold the parameters that it says it has."""
    if n_params > n_bytes:
        raise CheckpointError(
            f"{path} describes a model of {n_params:,} parameters and has {n_bytes:,} bytes; it is no file of MegaGPT's"
        )


def read_decoder_source(path: Path) -> Source:
    """:func:`read_source` of weights without a head. Raises CheckpointError for fine-tuned ones."""
    source = read_source(path)
    if source.finetuned:
        raise CheckpointError(
            f"{path} is fine-tuned already; give the pre-trained run that it came from, or ask it with megagpt predict"
        )
    return source


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


def config_hash(ds_config: dict, model: dict) -> str:
    """SHA-256 of the resolved DeepSpeed configuration, without its logs, and the model."""
    logs = ("tensorboard", "csv_monitor", "wandb", "comet", "flops_profiler", "comms_logger")
    kept = {key: value for key, value in ds_config.items() if key not in logs}
    return hashlib.sha256(json.dumps([kept, model], sort_keys=True, default=str).encode()).hexdigest()


def commit(tmp: Path, final: Path, entries: Iterable[FileEntry], header: dict) -> None:
    """Write the manifest of ``tmp`` and give the folder its real name; before this call the checkpoint does not exist.

    ``header`` holds what identifies the checkpoint: step, world size, ZeRO stage, precision, model, data.
    """
    files = {e.name: {"size": e.size, "sha256": e.sha256} for e in sorted(entries, key=lambda e: e.name)}
    write(tmp, {"format": FORMAT, **header, "files": files})
    publish(tmp, final)


def publish(tmp: Path, final: Path) -> None:
    """Give ``tmp``, whose manifest and other files are on disk, the name ``final``.

    What already has the name is of this very step: a damaged checkpoint, or one that was there when the disk failed.
    ``tmp`` takes its place.
    """
    for folder in (tmp, *(path for path in tmp.rglob("*") if path.is_dir())):
        storage.sync_path(folder)
    faults.point("manifest_synced")
    old = final.with_name(f".tmp-old-{final.name}")
    remove(old)
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, old)
    try:
        os.rename(tmp, final)
        faults.point("renamed")
        storage.sync_path(final.parent)
    except OSError:
        with contextlib.suppress(OSError):
            os.rename(old, final)  # it comes back where nothing has taken its place
        if final.exists():
            remove(old)
        raise
    remove(old)
    faults.point("committed")


def remove(path: Path) -> None:
    """Delete a folder or, without following it, a link, as far as that can be done."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write(folder: Path, manifest: dict) -> None:
    """Write the manifest of ``folder`` with the hash of itself, and force it to disk."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(_text(manifest))
        file.flush()
        faults.point("manifest_written")
        os.fsync(file.fileno())


def _text(manifest: dict) -> str:
    """The one text of a manifest. Its last entry is the hash of the text without it."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    own = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1)


def read(folder: Path) -> dict:
    """The manifest of a checkpoint folder. Raises ValueError with the reason when there is no usable one."""
    try:
        if (folder / MANIFEST).is_symlink() or (folder / MANIFEST).stat().st_size > _MOST_BYTES:
            raise ValueError("it is a link or too large to be one")
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or not manifest["files"]:
        raise ValueError(f"its {MANIFEST} lists no files")
    if type(manifest.get("format")) is not int or manifest["format"] not in (1, FORMAT):
        raise ValueError(f"its format is {manifest.get('format')!r} and this version reads {FORMAT}")
    if manifest.get("step") != step_of(folder):
        raise ValueError(f"its manifest is of step {manifest.get('step')!r}")
    for name, entry in manifest["files"].items():
        escapes = os.path.isabs(name) or ".." in Path(name).parts or "\0" in name
        if escapes or not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ValueError(f"its manifest has an impossible entry {name!r}")
    if (manifest["format"] != 1 or "sha256" in manifest) and text != _text(manifest):
        raise ValueError(f"its {MANIFEST} was changed: the hash in it is of another text")
    return manifest


def check_file(folder: Path, name: str, entry: dict) -> str | None:
    """What is wrong with one file against its manifest entry, or None."""
    found = _size_problem(folder, name, entry)
    if found:
        return found
    try:
        if hash_file(folder, name).sha256 != entry["sha256"]:
            return f"{name} is damaged: its SHA-256 differs from the manifest's"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _size_problem(folder: Path, name: str, entry: dict) -> str | None:
    path = folder / name
    if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        return f"{name} is missing"
    size = path.stat().st_size
    return None if size == entry["size"] else f"{name} has {size} bytes and its manifest says {entry['size']}"


def seems_whole(folder: Path) -> bool:
    """Whether manifest and sizes are right: what can be said of a checkpoint without reading all of it."""
    try:
        return not any(_size_problem(folder, *item) for item in read(folder)["files"].items())
    except (ValueError, OSError):
        return False


def problem(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Why ``folder`` cannot be loaded, or None when every file is what its manifest says.

    With ``parts`` ranks each reads the files ``part``, ``part + parts``, ...; all of them together read all.
    """
    try:
        manifest = read(folder)
    except ValueError as error:
        return str(error)
    # DeepSpeed takes shards by the pattern of their names.
    foreign = sorted({path.name for path in folder.glob("*.pt")} - manifest["files"].keys())
    if foreign:
        return f"it holds {foreign[0]}, of which its manifest knows nothing"
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
    if (root / LATEST).is_file():
        raise CheckpointError(
            f"{root} has had checkpoints, for it holds a file {LATEST}, and none is left; bring them back, "
            "or start again in another --run_dir"
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
    storage.replace(root / LATEST, tag_name(step))
    faults.point("latest_written")
