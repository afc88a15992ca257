"""Which parameters ZeRO-3 gathers in a step, and how many are whole at once: DeepSpeed's own bookkeeping, replayed.

After its use a parameter is released unless the recorded order of modules comes back to it within
``stage3_max_reuse_distance`` elements; parameters up to ``stage3_param_persistence_threshold`` are gathered once a
step; the next ones are fetched ahead, ``stage3_prefetch_bucket_size`` elements at a time (DeepSpeed 0.19,
runtime/zero/partitioned_param_coordinator.py). Two gathers of each parameter a micro-step, the usual figure, is right
only for models much larger than the reuse distance.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from megagpt.model.config import GPTConfig
from megagpt.tools.plan_model import parameters

_TABLE = "wte.weight"


@dataclass(frozen=True)
class Gathers:
    """Elements of the parameters gathered, without padding; one entry a gather of a parameter."""

    each_step: tuple[int, ...]
    micro_step: tuple[int, ...]
    most_live: int  # elements of parameters that are whole at once


def padded(numels: Iterable[int], world_size: int) -> int:
    """The sum of ``numels``, each filled up to a multiple of ``world_size``."""
    return sum(-(-n // world_size) * world_size for n in numels)


class _Use(NamedTuple):
    """A module about to compute, or ``done`` with it; backward passes are uses like forward ones."""

    names: tuple[str, ...]
    done: bool = False

    def end(self) -> "_Use":
        """The module is done."""
        return _Use(self.names, True)


def gathers(config: GPTConfig, *, prefetch: int, persistence: int, reuse: int = 10**9, live: int = 10**9) -> Gathers:
    """What a step gathers, with the four sizes of the ``zero_optimization`` section in elements."""
    sizes = {p.name: p.numel for p in parameters(config)}
    persistent = {name for name, numel in sizes.items() if numel <= persistence}
    replay = _Replay(sizes, persistent, _trace(config, list(sizes)), prefetch, reuse, live)
    gathered = replay.micro_step()
    return Gathers(tuple(sizes[name] for name in sorted(persistent)), gathered, replay.most_live)


def _trace(config: GPTConfig, names: list[str]) -> list[_Use]:
    """The modules in the order of a micro-step's two passes, with those that own no parameter: they fetch ahead too.

    The output projection reads the token table outside of its module: DeepSpeed counts it to the whole model, which
    needs it from the begin of each pass to the end. What the embeddings gather in the backward pass is released when it
    has ended: their inputs are no tensors with gradients, which would tell their turn.
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    owned = {module: tuple(names) for module, names in modules.items()}
    root, table, positions = _Use((_TABLE,)), _Use(owned["wte"]), _Use(owned["wpe"])
    blocks = [_Block(config.norm, owned, f"blocks.{i}.") for i in range(config.n_layer)]
    last = [] if config.norm == "post" else [_Use(owned["ln_f"])]
    every = config.activation_checkpointing
    trace = [root, table, positions, positions.end()]
    trace += [use for block in blocks for use in block.forward()]
    trace += [*last, root.end(), root, *last]
    for i in reversed(range(config.n_layer)):
        trace += blocks[i].recomputed() if every and i % every == 0 else blocks[i].backward()
    return [*trace, positions, table]


class _Block:
    """The order of the modules in one block."""

    def __init__(self, norm: str, owned: dict[str, tuple[str, ...]], prefix: str) -> None:
        ln_1, qkv, proj, ln_2, fc, out = (
            _Use(owned[prefix + name]) for name in ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.fc", "mlp.proj")
        )
        attn = mlp = _Use(())
        pre = norm == "pre"
        self.order = [ln_1, attn, qkv, proj, ln_2, mlp, fc, out] if pre else [attn, qkv, proj, ln_1, mlp, fc, out, ln_2]
        # In the backward pass a module comes before those inside of it, and a norm or block with two outputs twice.
        norms, whole = ([ln_1, ln_1], [ln_2, ln_2]), [_Use(()), _Use(())]
        if not pre:
            norms, whole = ([ln_1], [ln_2]), [_Use(())]
        inner = ([mlp, out, fc], [attn, proj, qkv])
        parts = (inner[0], norms[1], inner[1], norms[0]) if pre else (norms[1], inner[0], norms[0], inner[1])
        self.reverse = [whole, *parts]

    def forward(self) -> list[_Use]:
        return [_Use(()), *(use for module in self.order for use in (module, module.end()))]

    def backward(self) -> list[_Use]:
        uses = []
        for part in self.reverse:
            for i, module in enumerate(part):
                uses.append(module)
                if module not in part[i + 1 :]:
                    uses.append(module.end())
        return uses

    def recomputed(self) -> list[_Use]:
        """The last module's backward pass asks for what was not kept, and the block's forward pass runs inside of it.

        That is broken off where the last module has computed, before it is done.
        """
        uses = self.backward()
        at = uses.index(self.order[-1]) + 1
        return [*uses[:at], *self.forward()[:-1], *uses[at:]]


class _Replay:
    """Which parameters are whole over a micro-step whose modules compute in the order of ``trace``."""

    def __init__(self, sizes, persistent, trace, prefetch: int, reuse: int, live: int) -> None:
        self.sizes, self.persistent, self.trace = sizes, persistent, trace
        self.prefetch, self.reuse, self.live = prefetch, reuse, live
        self.whole = set(persistent)
        self.most_live = self.now_live = sum(sizes[name] for name in persistent)
        self.order = [use.names for use in trace if not use.done]
        # Elements of the modules before the i-th, and for each parameter the modules that use it.
        self.before = [0, *accumulate(sum(sizes[name] for name in names) for names in self.order)]
        self.uses: dict[str, list[int]] = {}
        for i, names in enumerate(self.order):
            for name in names:
                self.uses.setdefault(name, []).append(i)

    def micro_step(self) -> tuple[int, ...]:
        """The elements of every gather, in order; at the begin nothing but what persists is whole, as at the end."""
        self.gathered: list[int] = []
        self.available = 0  # as DeepSpeed counts it, from 0 in every micro-step
        self.fetched_for = dict.fromkeys(self.sizes, -1)
        self.queue = deque((name, i) for i, names in enumerate(self.order) for name in names)
        step = 0
        for names, done in self.trace:
            if done:
                self._release(names, step)
            else:
                self._fetch(names, step)
                step += 1
        return tuple(self.gathered)

    def _gather(self, name: str) -> None:
        self.whole.add(name)
        self.gathered.append(self.sizes[name])
        self.available += self.sizes[name]
        self.now_live += self.sizes[name]
        self.most_live = max(self.most_live, self.now_live)

    def _fetch(self, names: tuple[str, ...], step: int) -> None:
        for name in names:
            if name not in self.whole:
                self._gather(name)
        new = {name for name in names if self.fetched_for[name] < step}
        seen = set()
        while self.queue and len(seen) < len(new):
            name, last_use = self.queue.popleft()
            self.fetched_for[name] = last_use
            seen.add(name)
        most = min(self.live - self.available, self.prefetch)
        ahead: list[str] = []
        numel = 0
        while self.prefetch and self.queue and numel < most:
            name, last_use = self.queue.popleft()
            self.fetched_for[name] = max(self.fetched_for[name], last_use)
            if name not in self.whole and name not in ahead:
                ahead.append(name)
                numel += self.sizes[name]
        for name in ahead:
            self._gather(name)

    def _release(self, names: tuple[str, ...], step: int) -> None:
        for name in names:
            if name in self.persistent or name not in self.whole:
                continue
            if self.fetched_for[name] > step or self._again_soon(name, step):
                continue
            self.whole.discard(name)
            self.available -= self.sizes[name]
            self.now_live -= self.sizes[name]

    def _again_soon(self, name: str, step: int) -> bool:
        following = next((i for i in self.uses[name] if i >= step), None)
        return following is not None and self.before[following] - self.before[step] < self.reuse
