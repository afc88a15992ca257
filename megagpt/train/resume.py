"""Which checkpoint a run goes on from, and whether it may."""

from pathlib import Path

from megagpt import dist
from megagpt.errors import ConfigError
from megagpt.train import checkpoint, manifest, mirror
from megagpt.train.optim import decays_group
from megagpt.train.plan import Plan

_ARRANGEMENT = {"activation_checkpointing"}  # of the computation: any value gives the same model


def checkpoint_to_resume(plan: Plan) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, if any, and what the user should know about those passed over.

    Every rank calls this. Raises ConfigError where there is one that this run cannot go on from, CheckpointError where
    none is usable.
    """
    wanted = plan.settings.resume
    source, notes = None, []
    if wanted == "auto":
        if plan.settings.mirror is None:
            source, notes = manifest.newest_intact(plan.root, checkpoint.problem, checkpoint.folders)
        else:
            source, notes = mirror.newest_intact(plan.root, Path(plan.settings.mirror, manifest.FOLDER))
    elif wanted != "never":
        source, notes = manifest.locate(Path(wanted), checkpoint.problem, checkpoint.folders)
    dist.everywhere(lambda: _check(plan, source, notes) if dist.is_main() else None)
    return source, [*notes, *(_changes(plan, source) if source is not None else [])]


def _changes(plan: Plan, source: Path) -> list[str]:
    """What is not as it was when ``source`` was saved and need not be."""
    header, config = manifest.read(source), plan.config
    changes = []
    if header["world_size"] != config.world_size:
        batch = [config.micro_batch, config.accumulation, config.global_batch]
        before = header.get("batch", ["?", "?", "?"])
        kept = f"{batch[2]} kept" if before[2] == batch[2] else f"{before[2]} then, {batch[2]} now"
        changes.append(
            f"ranks: {header['world_size']} then, {config.world_size} now; {source.name} is cut anew; micro-batch "
            f"{before[0]} then, {batch[0]} now; accumulation {before[1]} then, {batch[1]} now; global batch {kept}; "
            "dropout draws anew"
        )
    if header["zero_stage"] != config.zero_stage:
        changes.append(f"ZeRO stage: {header['zero_stage']} then, {config.zero_stage} now")
    then, now = header.get("config_sha256"), manifest.config_hash(config.config, plan.model.to_dict())
    if not changes and then not in (None, now):
        changes.append(f"settings: {config.path} is not as it was (SHA-256 {then[:12]}... then, {now[:12]}... now)")
    return changes


def _check(plan: Plan, source: Path | None, notes: list[str]) -> None:
    if plan.settings.resume == "never":
        _refuse_any(plan)
    elif plan.settings.resume != "auto":
        _refuse_two_histories(plan, source, notes)
    if source is not None:
        _check_same_run(plan, source)
        checkpoint.check_layout(source, plan.config)


def load(engine, source: Path, plan: Plan) -> checkpoint.TrainState:
    """Load ``source`` into ``engine``. The file holds the settings of its time; today's flags count."""
    state = checkpoint.load(engine, source, plan.config, seed=plan.settings.seed)
    state.model = plan.model.to_dict()
    for group in engine.optimizer.param_groups:
        group["betas"], group["eps"] = plan.optimiser["betas"], plan.optimiser["eps"]
        if decays_group(group["name"]):
            group["weight_decay"] = plan.optimiser["weight_decay"]
    return state


def _refuse_any(plan: Plan) -> None:
    found = manifest.folders(plan.root)
    if found:
        raise ConfigError(
            f"{plan.run_dir} already holds checkpoints (newest {found[0].name}) and --resume is never; "
            "choose another --run_dir, or --resume auto to continue"
        )


def _refuse_two_histories(plan: Plan, source: Path, notes: list[str]) -> None:
    """Raise ConfigError where the run folder has checkpoints that a run from ``source`` on would not lead to.

    The next start could not tell which of the two to go on from.
    """
    own = source.parent.resolve() == plan.root.resolve()
    if own and notes:
        return  # what is newer is damaged
    others = [f for f in manifest.folders(plan.root) if not own or manifest.step_of(f) > manifest.step_of(source)]
    if others:
        raise ConfigError(
            f"--resume {plan.settings.resume} goes on from step {manifest.step_of(source)} and {plan.run_dir} already "
            f"holds {others[0].name}; choose another --run_dir, move the newer checkpoints away, or use --resume auto"
        )


def _check_same_run(plan: Plan, source: Path) -> None:
    """Raise ConfigError where ``source`` is of another model, other data or a later step than this run has."""
    saved = checkpoint.read_state(source)
    for what, found, wanted in (
        ("another model", saved.model, plan.model.to_dict()),
        ("other data", saved.data, plan.identity),
    ):
        keys = sorted({*found, *wanted} - _ARRANGEMENT)
        differing = [key for key in keys if found.get(key) != wanted.get(key)]
        if differing:
            details = ", ".join(f"{key} {found.get(key)} there and {wanted.get(key)} now" for key in differing)
            raise ConfigError(
                f"{source} is of {what}: {details[:600]}; use the settings it was trained with, another "
                "--run_dir, or --init_from to start a new run from its weights"
            )
    if saved.step > plan.total_steps:
        raise ConfigError(
            f"{source} is at step {saved.step} and the run ends at {plan.total_steps}; raise --max_steps to go on"
        )
