"""Saving and loading a training run so that it goes on exactly where it was.

The order of a save: every rank writes its shard and its random state into a hidden folder, hashing what it writes and
forcing it to disk; all ranks agree that nothing failed; rank 0 writes the manifest and renames the folder. A process
killed anywhere in between leaves the older checkpoints as they were.
"""

import contextlib
import io
import json
import pickle
import random
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from megagpt import dist
from megagpt.config.deepspeed import ResolvedConfig
from megagpt.errors import CheckpointError, ConfigError, StorageError
from megagpt.model.gpt import decays
from megagpt.train import manifest
from megagpt.train.writer import Writer


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint holds beside weights, optimiser and random states."""

    step: int = 0  # optimiser steps taken, skipped ones included
    samples: int = 0  # windows consumed: the next one is sample number ``samples``
    tokens: int = 0
    best_loss: float | None = None  # lowest validation loss among the saved checkpoints
    best_step: int | None = None
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)


def rng_state() -> dict:
    """The state of every random generator of this rank: torch's of CPU and device, numpy's and Python's."""
    version, words, gauss = random.getstate()
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(pos), int(has_gauss), float(cached)],
    }


def set_rng_state(state: dict) -> None:
    """The inverse of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))


def _rng_name(rank: int) -> str:
    return f"rng_rank_{rank}.pt"


def free_bytes_needed(n_params: int, config: ResolvedConfig) -> int:
    """About what one checkpoint takes on disk: weights in their dtype, fp32 master copy and two moments."""
    weights = 4 if config.precision == "fp32" else 2
    master = 0 if config.precision == "fp32" and config.zero_stage == 0 else 4
    return n_params * (weights + master + 8)


def check_space(root: Path, needed: int) -> None:
    """Raise StorageError where ``root`` cannot take ``needed`` more bytes."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise StorageError(
            f"{root} has {_size(free)} free and a checkpoint takes about {_size(needed)}; "
            "free some space, lower --keep_last, or choose another --run_dir"
        )


def _size(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def save(engine, root: Path, state: TrainState, config: ResolvedConfig, *, needed: int) -> Path:
    """Write the checkpoint of ``state.step`` under ``root`` and return its folder; every rank calls it.

    Raises StorageError on every rank when any rank could not write; nothing that was there before is touched then.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    final, tmp = root / manifest.tag_name(state.step), root / manifest.tmp_name(state.step)
    dist.everywhere(lambda: _prepare_folder(root, tmp, needed) if rank == 0 else None)

    writer = Writer(tmp)
    engine.checkpoint_engine.save = writer.save
    engine._copy_recovery_script = partial(_copy_scripts, engine)
    # Without this key DeepSpeed's converter to other numbers of ranks refuses ZeRO-1 and 2.
    client_state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
    with _without_crc32():
        engine.save_checkpoint(str(root), tag=tmp.name, client_state=client_state, save_latest=False)
        writer.save(rng_state(), tmp / _rng_name(rank))
        writer.finish()
    dist.everywhere(lambda: _finish_rank(writer, tmp, rank, state))

    shares = dist.gather_json([asdict(entry) for entry in writer.entries])
    entries = [manifest.FileEntry(**entry) for share in shares for entry in share]
    dist.everywhere(lambda: _commit(tmp, final, entries, state, config, world_size) if rank == 0 else None)
    return final


def _copy_scripts(engine, root: str) -> None:
    """Put DeepSpeed's tools beside the checkpoints; a run does not end, nor its peers wait, where that fails."""
    with contextlib.suppress(OSError):
        type(engine)._copy_recovery_script(engine, root)


@contextlib.contextmanager
def _without_crc32():
    """The manifest's SHA-256 says more than an archive's CRC-32, which torch does not check on reading."""
    checked = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(checked)


def _prepare_folder(root: Path, tmp: Path, needed: int) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        check_space(root, needed)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
    except OSError as error:
        raise StorageError(f"cannot write checkpoints to {root}: {error.strerror}") from None


def _finish_rank(writer: Writer, tmp: Path, rank: int, state: TrainState) -> None:
    try:
        writer.add_existing(f"offloaded_tensors/rank{rank:02d}/**/*")
        if rank == 0:
            manifest.write_atomically(tmp / manifest.STATE, json.dumps(asdict(state), indent=1))
            writer.entries.append(manifest.hash_file(tmp, manifest.STATE))
    except OSError as error:
        writer.error = writer.error or error
    try:
        writer.raise_error()
    except StorageError:
        shutil.rmtree(tmp, ignore_errors=True)  # a partial checkpoint would eat the space that is missing
        raise


def _commit(tmp, final, entries, state: TrainState, config: ResolvedConfig, world_size: int) -> None:
    header = {
        "step": state.step,
        "world_size": world_size,
        "zero_stage": config.zero_stage,
        "precision": config.precision,
        "model": state.model,
        "data": state.data,
    }
    try:
        if final.exists():  # a damaged checkpoint of this very step: the good one takes its place
            shutil.rmtree(final)
        manifest.commit(tmp, final, entries, header)
        manifest.write_latest(final.parent, state.step)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise StorageError(f"cannot commit the checkpoint {final}: {error.strerror}") from None


def folders(root: Path) -> list[Path]:
    """Like :func:`manifest.folders`, as rank 0 sees them: on a network disk another node may see an older state."""
    return [root / name for name in dist.gather_json([folder.name for folder in manifest.folders(root)])[0]]


def problem(folder: Path) -> str | None:
    """Like :func:`manifest.problem`, with the reading shared out: every rank calls it and gets the same answer."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = dist.gather_json(manifest.problem(folder, part=rank, parts=world_size))
    return next((reason for reason in found if reason), None)


def check_layout(folder: Path, config: ResolvedConfig) -> None:
    """Raise ConfigError where a checkpoint was cut in another way than this run cuts its own."""
    header = manifest.read(folder)
    differing = [
        f"{what} {found} in the checkpoint and {wanted} now"
        for what, found, wanted in (
            ("number of ranks", header["world_size"], config.world_size),
            ("ZeRO stage", header["zero_stage"], config.zero_stage),
            ("precision", header["precision"], config.precision),
        )
        if found != wanted
    ]
    if differing:
        raise ConfigError(
            f"cannot resume {folder}: {', '.join(differing)}; use the settings it was saved with, or start a new run "
            f"from its weights with --init_from {folder} --run_dir <new folder>"
        )


def load(engine, folder: Path) -> TrainState:
    """Load weights, optimiser, loss scaler and random states of an intact checkpoint into ``engine``; its state."""
    state = read_state(folder)
    allow_checkpoint_classes()
    try:
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except pickle.UnpicklingError as error:
        raise _foreign(folder, error) from None
    if loaded is None:
        raise CheckpointError(f"DeepSpeed did not load {folder}; check that all ranks see this folder")
    set_rng_state(torch.load(folder / _rng_name(torch.distributed.get_rank()), weights_only=True))
    return state


def _foreign(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds something other than tensors and plain values and was refused, for loading it could run code "
        f"({str(error).splitlines()[0][:200]}); use a checkpoint that MegaGPT wrote"
    )


def read_state(folder: Path) -> TrainState:
    """The part of a checkpoint that is no tensor."""
    return TrainState(**json.loads((folder / manifest.STATE).read_text(encoding="utf-8")))


def allow_checkpoint_classes() -> None:
    """Name the four plain classes that DeepSpeed puts in its checkpoints; everything else in a pickle is refused."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Full weights in fp32, whatever ZeRO stage they were saved under, and the model's settings.

    ``path`` is a run folder (its newest intact checkpoint), a checkpoint folder, or a .safetensors file (whose
    settings are in its metadata under ``config``). Raises CheckpointError when there is nothing usable.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    folder, _ = manifest.locate(path)
    state, header = read_state(folder), manifest.read(folder)
    from megagpt.train.engine import import_deepspeed

    import_deepspeed()
    allow_checkpoint_classes()
    try:
        weights = _whole_weights(folder, header["zero_stage"])
    except pickle.UnpicklingError as error:
        raise _foreign(folder, error) from None
    return {name: tensor.float() for name, tensor in weights.items()}, state.model


def _whole_weights(folder: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    if zero_stage == 0:
        saved = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True, map_location="cpu", mmap=True)
        return _with_masters(saved["module"], saved["optimizer"])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # It reports its progress with print and tqdm.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)


def _with_masters(weights: dict[str, torch.Tensor], optimizer: dict) -> dict[str, torch.Tensor]:
    """``weights`` as an unsharded run updates them: in fp32, where it trained in 16 bits.

    DeepSpeed keeps these for each parameter group as a list or, under its own Adam, one behind the other.
    """
    masters = optimizer.get("fp32_groups") or optimizer.get("fp32_groups_flat")
    if masters is None:
        return weights
    groups = [[name for name in weights if decays(name) == wanted] for wanted in (True, False)]  # as the optimiser's
    whole = {}
    for names, master in zip(filter(None, groups), masters, strict=True):
        flat = master if torch.is_tensor(master) else torch.cat([tensor.flatten() for tensor in master])
        parts = flat.split([weights[name].numel() for name in names])
        whole |= {name: part.view_as(weights[name]) for name, part in zip(names, parts, strict=True)}
    return whole


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with manifest.open_safetensors(path, framework="pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 no mapping
    return weights, manifest.read_source(path).model
