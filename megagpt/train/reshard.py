"""Loading a checkpoint on another number of ranks than it was saved on, by way of DeepSpeed's universal checkpoint.

What DeepSpeed 0.19 loads is checked afterwards: under ZeRO-3 it gives every parameter group the settings of the first
one, and one tensor to all groups as their count of Adam's steps, which then runs that many times as fast.
"""

import argparse
import contextlib
import io
import pickle
import shutil
from pathlib import Path

import torch

from megagpt import dist
from megagpt.errors import CheckpointError, MegaGPTError, StorageError


def load(engine, folder: Path) -> None:
    """Load weights and optimiser of ``folder``, split by ZeRO, into an engine of another number of ranks.

    Every rank calls this. Rank 0 writes the converted checkpoint, as large as the first, beside it and removes it in
    the end. Raises CheckpointError where DeepSpeed cannot convert it or what it loaded is not what was saved,
    StorageError where the disk does not take it.
    """
    optimizer = engine.optimizer
    settings = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
    converted = folder.with_name(f".tmp-universal-{folder.name}")
    try:
        dist.everywhere(lambda: _convert(folder, converted) if dist.is_main() else None)
        engine._config.load_universal_checkpoint = True
        # Ranks talk to each other in there: one that fails alone must not wait for what the others say of it.
        loaded = _load_converted(engine, folder, converted)
    finally:
        engine._config.load_universal_checkpoint = False
        if dist.is_main():
            shutil.rmtree(converted, ignore_errors=True)
    if loaded is None:
        raise CheckpointError(f"DeepSpeed did not load {folder}; check that all ranks see this folder")
    _load_buffers(engine, folder)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # rates and decay are of the flags, as in every resumed run
    states = [state for state in optimizer.optimizer.state.values() if "step" in state]
    _part_steps(states)
    dist.everywhere(lambda: _check(engine, folder, states))


def _load_buffers(engine, folder: Path) -> None:
    """What the model has beside parameters, and DeepSpeed leaves out here."""
    buffers = dict(engine.module.named_buffers())
    if buffers:
        path = min(folder.glob("*_model_states.pt"))
        saved = torch.load(path, weights_only=True, map_location="cpu")["module"]
        for name in buffers.keys() & saved.keys():
            buffers[name].copy_(saved[name])


def _convert(folder: Path, converted: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(converted, ignore_errors=True)
    arguments = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(converted / folder.name),  # whose parent gets a pointer of DeepSpeed's
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            converted.mkdir()
            ds_to_universal.main(arguments)
        except (AssertionError, LookupError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise _refused(folder, error) from error
        except OSError as error:
            raise StorageError(
                f"cannot write {converted}, which cutting {folder.name} anew takes for a while: {error.strerror}; free "
                "some space, or resume on as many ranks as saved it"
            ) from error


def _load_converted(engine, folder: Path, converted: Path):
    try:
        with _groups_without_a_part(engine.optimizer):
            return engine.load_checkpoint(str(converted), tag=folder.name)[0]
    except (AssertionError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise _refused(folder, error) from error


class _NoParameter:
    """Stands for the parameters of a group of which a rank has no part: there is nothing to load."""

    @property
    def _hp_mapping(self):
        return self

    def load_hp_checkpoint_state(self, *_, **__) -> None:
        return None

    def get_optim_state_keys(self) -> list[str]:
        return []


@contextlib.contextmanager
def _groups_without_a_part(optimizer):
    """Let DeepSpeed load where a small group lies on other ranks alone; it takes for granted that each has a part."""
    load = getattr(optimizer, "load_hp_checkpoint_state_from_checkpoint_dir", None)
    names = getattr(optimizer, "param_names", None)
    if load is None or not isinstance(names, dict):  # not so under ZeRO-3
        yield
        return
    stand_in = _NoParameter()

    def load_parts(groups_name: str, checkpoint_dir: str) -> None:
        groups = getattr(optimizer, groups_name)
        without = [all(p._hp_mapping is None for p in group) for group in groups]
        setattr(optimizer, groups_name, [[stand_in] if w else g for g, w in zip(groups, without, strict=True)])
        try:
            load(groups_name, checkpoint_dir)
        finally:
            setattr(optimizer, groups_name, groups)

    names[stand_in] = "none"
    optimizer.load_hp_checkpoint_state_from_checkpoint_dir = load_parts
    try:
        yield
    finally:
        del optimizer.load_hp_checkpoint_state_from_checkpoint_dir, names[stand_in]


def _refused(folder: Path, error: Exception) -> CheckpointError:
    why = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return CheckpointError(
        f"{folder} cannot be cut anew for another number of ranks ({why}); resume it on as many as saved it"
    )


def _part_steps(states: list[dict]) -> None:
    """Give every tensor a count of steps of its own: each is advanced in place."""
    for state in states:
        if torch.is_tensor(state["step"]):
            state["step"] = state["step"].clone()


def _check(engine, folder: Path, states: list[dict]) -> None:
    """Raise CheckpointError where a count of Adam's steps is not the number of updates of the run."""
    expected = engine.global_steps - engine.skipped_steps
    found = {int(state["step"]) for state in states}
    if found - {expected}:
        raise _refused(folder, MegaGPTError(f"Adam is at step {sorted(found)} and the run at update {expected}"))
