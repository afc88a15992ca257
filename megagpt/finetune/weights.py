"""Whole weights in float32: where a run begins, what a phase hands to the next, and the model it leaves.

Rank 0 holds them, on the CPU. Names are those of :class:`megagpt.finetune.model.Classifier`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megagpt import dist
from megagpt.config.deepspeed import ResolvedConfig
from megagpt.data import storage
from megagpt.errors import CheckpointError, ConfigError, StorageError
from megagpt.finetune.model import Classifier
from megagpt.finetune.plan import FinetunePlan
from megagpt.finetune.spec import TaskSpec
from megagpt.model.config import GPTConfig
from megagpt.ops import Ops, load_ops
from megagpt.train import engine as deepspeed_engine
from megagpt.train import manifest
from megagpt.train.seeds import seed_all
from megagpt.train.weights import read_weights

MODEL = "model.safetensors"  # of a run folder: the best weights

Weights = dict[str, Tensor]


def initial(plan: FinetunePlan) -> Weights:
    """New values drawn from the run's seed, with the pre-trained ones over them as far as they are taken."""
    seed_all(plan.settings.seed)
    ops = load_ops("torch", head_width=plan.model.head_width, dtype=torch.float32, device="cpu")
    with torch.device("cpu"):
        weights = {name: tensor.clone() for name, tensor in Classifier(plan.model, plan.spec, ops).state_dict().items()}
    taken = [name for name in weights if _is_transferred(name, plan.n_transfer, plan.model.n_layer)]
    if not taken:
        return weights
    source, _ = read_weights(Path(plan.settings.init_from))
    for name in taken:
        _take(weights[name], name, source, plan)
    return weights


def _is_transferred(name: str, n_transfer: int, n_layer: int) -> bool:
    """Embeddings from 0 on, then block by block; the last LayerNorm goes with all blocks."""
    if not name.startswith("gpt.") or n_transfer < 0:
        return False
    part, _, rest = name.removeprefix("gpt.").partition(".")
    if part == "blocks":
        return int(rest.partition(".")[0]) < n_transfer
    return part in ("wte", "wpe") or n_transfer == n_layer


def _take(ours: Tensor, name: str, source: Weights, plan: FinetunePlan) -> None:
    theirs = source.get(name.removeprefix("gpt."))
    rows = plan.source_model.vocab_size if name == "gpt.wte.weight" else ours.shape[0]
    if theirs is None or theirs.shape != (rows, *ours.shape[1:]):
        found = "none" if theirs is None else f"one of shape {tuple(theirs.shape)}"
        raise CheckpointError(
            f"{plan.settings.init_from} does not hold the weights of the decoder it describes: "
            f"{name.removeprefix('gpt.')} should have the shape {(rows, *ours.shape[1:])} and there is {found}"
        )
    ours[:rows] = theirs  # the rows after the vocabulary are the task tokens, which are new


def put(weights: Weights, module: nn.Module, config: ResolvedConfig) -> None:
    """Give ``weights`` of rank 0 to a module that may be sharded; the engine later hands them to the other ranks."""
    for name, parameter in module.named_parameters():
        with deepspeed_engine.full_parameters([parameter], config, modify=True):
            if dist.is_main():
                with torch.no_grad():
                    parameter.copy_(weights[name])


def put_buffers(weights: Weights, module: nn.Module) -> None:
    """Give rank 0's running statistics to every rank."""
    for name, buffer in module.named_buffers():
        if dist.is_main():
            buffer.copy_(weights[name])
        if torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast(buffer, 0)


def average_buffers(module: nn.Module) -> None:
    """Running statistics are each rank's own while training; from here on they are the mean over the ranks."""
    if torch.distributed.get_world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                deepspeed_engine.mean_over_ranks(buffer)


def collect(engine, start: Weights, config: ResolvedConfig) -> Weights:
    """The whole weights of ``engine`` on rank 0: what it trains from its master copies, the rest from ``start``."""
    weights = dict(start)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            value = deepspeed_engine.full_fp32(engine, parameter, config)
            if dist.is_main():
                weights[name] = value
    if dist.is_main():
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()}
    return weights


def digests(module: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> dict[str, str]:
    """SHA-256 of this rank's part of every parameter that is ``wanted``, to the last bit."""
    found = {}
    for name, parameter in module.named_parameters():
        if wanted(parameter):
            part = getattr(parameter, "ds_tensor", parameter).detach().cpu().contiguous()
            found[name] = hashlib.sha256(part.view(-1).view(torch.uint8).numpy()).hexdigest()
    return found


def save(weights: Weights, path: Path, plan: FinetunePlan) -> None:
    """Write ``weights`` with what they are of. Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {
        "config": json.dumps(plan.model.to_dict()),
        "tokenizer_sha256": plan.tokenizer.sha256,
        "task": json.dumps(plan.spec.to_dict()),
    }
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp, metadata=about)
        storage.sync_path(tmp)
        tmp.replace(path)
        storage.sync_path(path.parent)
    except (OSError, SafetensorError) as error:
        tmp.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}; free space or choose another --run_dir") from None


def read(path: Path) -> Weights:
    """The weights in ``path``. Raises CheckpointError."""
    with manifest.open_safetensors(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping


def load(path: Path, device: torch.device | str) -> tuple[Classifier, str]:
    """The fine-tuned model in ``path`` in evaluation mode, in float32, and its tokenizer's SHA-256.

    Raises CheckpointError where it is none.
    """
    with manifest.open_safetensors(path, framework="pt") as file:
        about = file.metadata() or {}
    if "task" not in about:
        raise CheckpointError(f"{path} is not a fine-tuned model; give the run folder of finetune.py")
    spec, config, sha256 = described(about, path, n_bytes=path.stat().st_size)
    ops: Ops = load_ops("auto", head_width=config.head_width, dtype=torch.float32, device=torch.device(device))
    with torch.device("meta"):
        model = Classifier(config, spec, ops)
    try:
        model.load_state_dict(read(path), assign=True)
    except RuntimeError as error:
        fault = str(error).splitlines()[-1].strip()[:300]
        raise CheckpointError(f"{path} does not hold the weights of the model it describes: {fault}") from None
    return model.to(device).eval(), sha256


def described(about: Mapping[str, str], path: Path, *, n_bytes: int) -> tuple[TaskSpec, GPTConfig, str]:
    """What the metadata of a fine-tuned model's file of ``n_bytes`` say: task, decoder and SHA-256 of the tokenizer.

    Raises CheckpointError where they say nothing that can be: a few words must not ask for endless memory.
    """
    try:
        config = GPTConfig.from_dict(_object(about["config"]))
        spec = TaskSpec.from_dict(_object(about["task"]))
        sha256 = about["tokenizer_sha256"]
    except (KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
        fault = f"no {error}" if isinstance(error, KeyError) else (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{path} does not say what its weights are of ({fault[:300]}); give the run folder of finetune.py"
        ) from None
    manifest.check_size(config.n_params(), path, n_bytes)
    return spec, config, sha256


def _object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("its description is no JSON object")
    return value
