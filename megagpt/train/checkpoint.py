"""Saving and loading a training run so that it goes on exactly where it was.

The order of a save: every rank writes its shard and its random state into a hidden folder, hashing what it writes and
forcing it to disk; all ranks agree that nothing failed; rank 0 writes the manifest and renames the folder. A process
killed anywhere in between leaves the older checkpoints as they were.
"""

import contextlib
import copy
import json
import shutil
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from megagpt import dist
from megagpt.config.deepspeed import ResolvedConfig
from megagpt.data import storage
from megagpt.errors import CheckpointError, ConfigError, StorageError
from megagpt.train import faults, manifest, reshard
from megagpt.train.safe import refuse_code_everywhere
from megagpt.train.seeds import rng_state, seed_all, set_rng_state
from megagpt.train.writer import Writer


@dataclass
class TrainState:
    """Where a run stands: what a checkpoint holds beside weights, optimiser and random states."""

    step: int = 0  # optimiser steps taken, skipped ones included
    samples: int = 0  # windows consumed: the next one is sample number ``samples``
    tokens: int = 0
    best_loss: float | None = None  # lowest validation loss among the saved checkpoints
    best_step: int | None = None
    nan_steps: int = 0  # updates skipped for what is not finite or leapt; fp16's search for its scale is not among them
    typical_loss: float | None = None  # running mean, where spikes are looked for
    rewinds: list = field(default_factory=list)  # see megagpt.train.rewind
    model: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)


def _rng_name(rank: int) -> str:
    return f"rng_rank_{rank}.pt"


def free_bytes_needed(n_params: int, config: ResolvedConfig) -> int:
    """About what one checkpoint takes on disk: weights in their dtype, fp32 master copy and two moments."""
    weights = 4 if config.precision == "fp32" else 2
    master = 0 if config.precision == "fp32" and config.zero_stage == 0 else 4
    return n_params * (weights + master + 8)


def check_space(root: Path, needed: int, kept: int = 0) -> None:
    """Raise StorageError where ``root`` cannot take ``needed`` bytes of a checkpoint and ``kept`` of its weights."""
    free = shutil.disk_usage(root).free
    if free < needed + kept:
        beside = f", and the weights kept of it {size(kept)}" if kept else ""
        raise StorageError(
            f"{root} has {size(free)} free and a checkpoint takes about {size(needed)}{beside}; "
            "free some space, lower --keep_last, or choose another --run_dir"
        )


def _check_space_to_cut(folder: Path) -> None:
    """Raise StorageError where there is no room beside a checkpoint for the converted one, which is about as large."""
    needed = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder.parent} has {size(free)} free, and cutting {folder.name} anew for another number of ranks takes "
            f"about {size(needed)} for a while; free some space, or resume on as many ranks as saved it"
        )


def size(n: int) -> str:
    """``n`` bytes for people."""
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def save(engine, root: Path, state: TrainState, config: ResolvedConfig, *, needed: int) -> Path:
    """Write the checkpoint of ``state.step`` under ``root`` and return its folder; every rank calls it.

    Raises StorageError on every rank when any rank could not write; nothing that was there before is touched then.
    """
    return begin(engine, root, state, config, needed=needed, in_background=False).finish()


def begin(
    engine, root: Path, state: TrainState, config: ResolvedConfig, *, needed: int, in_background: bool
) -> "UnfinishedSave":
    """The first part of :func:`save`: the files are being written, ``in_background`` from a copy in memory.

    There is no checkpoint before :meth:`UnfinishedSave.finish`. Without ``in_background`` it has to come before the
    next update of the weights.
    """
    rank = torch.distributed.get_rank()
    tmp = root / manifest.tmp_name(state.step)
    faults.point("save_begun")
    dist.everywhere(lambda: _prepare_folder(root, tmp, needed) if rank == 0 else None)

    writer = Writer(tmp, copied=in_background)
    engine.checkpoint_engine.save = writer.save
    engine._copy_recovery_script = partial(_copy_scripts, engine)
    # Without this key DeepSpeed's converter to other numbers of ranks refuses ZeRO-1 and 2.
    client_state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
    with _without_crc32():  # the threads that write look at it; those of a save in the background may compute it
        engine.save_checkpoint(str(root), tag=tmp.name, client_state=client_state, save_latest=False)
        writer.save(rng_state(), tmp / _rng_name(rank))
        faults.point("shards_written")
        if not in_background:
            writer.finish()
    return UnfinishedSave(writer, tmp, root / manifest.tag_name(state.step), copy.deepcopy(state), config)


@dataclass
class UnfinishedSave:
    """A checkpoint whose files are being written."""

    writer: Writer
    tmp: Path
    final: Path
    state: TrainState  # of the step that is saved
    config: ResolvedConfig

    def written(self) -> bool:
        """Whether the files of this rank are on disk, or have failed."""
        return self.writer.done()

    def finish(self) -> Path:
        """Wait for the files and make them a checkpoint; its folder. Every rank calls this. Raises StorageError."""
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        tmp, writer = self.tmp, self.writer
        writer.finish()
        try:
            dist.everywhere(lambda: _finish_rank(writer, tmp, rank, self.state))
        except StorageError:
            # A partial checkpoint would eat the space that is missing. Nobody writes to it any more.
            if rank == 0:
                shutil.rmtree(tmp, ignore_errors=True)
            raise
        faults.point("ranks_agreed")
        shares = dist.gather_json([asdict(entry) for entry in writer.entries])
        entries = [manifest.FileEntry(**entry) for share in shares for entry in share]
        dist.everywhere(
            lambda: _commit(tmp, self.final, entries, self.state, self.config, world_size) if rank == 0 else None
        )
        return self.final


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
        storage.make_folder(root)
        check_space(root, needed)
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        faults.point("folder_made")
    except OSError as error:
        raise StorageError(f"cannot write checkpoints to {root}: {error.strerror}") from None


def _finish_rank(writer: Writer, tmp: Path, rank: int, state: TrainState) -> None:
    try:
        writer.add_existing(f"offloaded_tensors/rank{rank:02d}/**/*")
        if rank == 0:
            storage.replace(tmp / manifest.STATE, json.dumps(asdict(state), indent=1))
            writer.entries.append(manifest.hash_file(tmp, manifest.STATE))
            faults.point("state_written")
        faults.point("rank_done")
    except OSError as error:
        writer.error = writer.error or error
    writer.raise_error()


def _commit(tmp, final, entries, state: TrainState, config: ResolvedConfig, world_size: int) -> None:
    header = {
        "step": state.step,
        "world_size": world_size,
        "zero_stage": config.zero_stage,
        "precision": config.precision,
        "config_sha256": manifest.config_hash(config.config, state.model),
        "batch": [config.micro_batch, config.accumulation, config.global_batch],
        "model": state.model,
        "data": state.data,
    }
    try:
        manifest.commit(tmp, final, entries, header)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise StorageError(f"cannot commit the checkpoint {final}: {error.strerror}") from None
    with contextlib.suppress(OSError):  # a hint for other tools: the checkpoint is there without it
        manifest.write_latest(final.parent, state.step)


def folders(root: Path) -> list[Path]:
    """Like :func:`manifest.folders`, as rank 0 sees them: on a network disk another node may see an older state."""
    return [root / name for name in dist.gather_json([folder.name for folder in manifest.folders(root)])[0]]


def problem(folder: Path) -> str | None:
    """Like :func:`manifest.problem`, with the reading shared out: every rank calls it and gets the same answer."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = dist.gather_json(manifest.problem(folder, part=rank, parts=world_size))
    return next((reason for reason in found if reason), None)


def check_layout(folder: Path, config: ResolvedConfig) -> None:
    """Raise ConfigError where a checkpoint was cut in a way that this run cannot go on from.

    Another number of ranks is none: :func:`load` cuts it anew. ZeRO-1 and 2 have the same files.
    """
    header = manifest.read(folder)
    ranks, stages = header["world_size"], (header["zero_stage"], config.zero_stage)
    cut_anew = ranks != config.world_size
    differing = [
        f"{what} {found} in the checkpoint and {wanted} now"
        for what, found, wanted, matters in (
            ("number of ranks", ranks, config.world_size, config.offload_optimizer == "nvme" or stages[0] != stages[1]),
            ("ZeRO stage", *stages, cut_anew or set(stages) != {1, 2}),
            ("precision", header["precision"], config.precision, True),
        )
        if found != wanted and matters
    ]
    if differing:
        raise ConfigError(
            f"cannot resume {folder}: {', '.join(differing)}; use the settings it was saved with, or start a new run "
            f"from its weights with --init_from {folder} --run_dir <new folder>"
        )


def load(engine, folder: Path, config: ResolvedConfig, *, seed: int) -> TrainState:
    """Load weights, optimiser, loss scaler and random states of an intact checkpoint into ``engine``; its state.

    Other ranks than those that saved it get random states of their own from ``seed`` and the step.
    """
    state = read_state(folder)
    cut_anew = manifest.read(folder)["world_size"] != config.world_size
    refuse_code_everywhere(folder)
    if cut_anew and config.zero_stage > 0:
        dist.everywhere(lambda: _check_space_to_cut(folder) if dist.is_main() else None)
        reshard.load(engine, folder)
        loaded = folder
    else:  # without ZeRO every rank has all of it
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed did not load {folder}; check that all ranks see this folder")
    if cut_anew:
        seed_all(seed + 1 + torch.distributed.get_rank() + 1_000_003 * state.step)
    else:
        set_rng_state(torch.load(folder / _rng_name(torch.distributed.get_rank()), weights_only=True))
    return state


def read_state(folder: Path) -> TrainState:
    """The part of a checkpoint that is no tensor. Raises CheckpointError where that is not what a run writes."""
    try:
        state = TrainState(**json.loads((folder / manifest.STATE).read_text(encoding="utf-8")))
        numbers = (state.step, state.samples, state.tokens, state.nan_steps)
        if not all(type(number) is int and number >= 0 for number in numbers) or state.step != manifest.step_of(folder):
            raise ValueError(f"step {state.step!r}, {state.samples!r} samples, {state.tokens!r} tokens")
        if not isinstance(state.model, dict) or not isinstance(state.data, dict) or not isinstance(state.rewinds, list):
            raise ValueError("model, data or rewinds of another kind")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / manifest.STATE} is not of a run ({str(error)[:200]}); use a checkpoint that MegaGPT wrote"
        ) from None
    return state
