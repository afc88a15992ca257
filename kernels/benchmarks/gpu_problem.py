"""One operation at one shape: who computes it, what is right, and what bounds its time.

Results are checked before anything is timed: outputs and gradients of every provider against the definition in float64.
The yardstick is the definition's own error in the inputs' dtype. Who is wrong gets no time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from gpu_peers import first_line
from torch import Tensor

Call = Callable[..., Tensor | tuple[Tensor, ...]]
PASSES = ("forward", "backward", "both")


@dataclass
class Problem:
    """``providers`` compute one function of ``inputs`` by keyword, and gradients of those inputs that require them."""

    op: str
    shape: str
    dims: dict[str, int]
    dtype: torch.dtype
    dropout: float
    inputs: dict[str, Tensor]
    upstream: tuple[Tensor, ...]  # gradients of the outputs
    definition: Call  # in whatever dtype its inputs have
    providers: dict[str, Call]
    absent: dict[str, str]  # provider: why it is not among them
    own_masks: frozenset[str] = frozenset()  # providers whose dropout masks are not the definition's
    undropped: Call | None = None  # the definition without dropout
    flops: dict[str, float] = field(default_factory=dict)  # of each pass; none where only memory counts
    bytes: dict[str, float] = field(default_factory=dict)  # that each pass cannot avoid to read and write
    part: Callable[[Tensor], Tensor] = lambda x: x  # of inputs and results, that the definition is computed for
    passes: tuple[str, ...] = PASSES

    def work(self, call: Call, which: str) -> Callable[[], object]:
        """A pass of one provider as a function without arguments."""
        leaves = [x for x in self.inputs.values() if x.requires_grad]
        if which == "forward":
            return lambda: call(**self.inputs)
        if which == "both":
            return lambda: torch.autograd.grad(as_tuple(call(**self.inputs)), leaves, self.upstream)
        outputs = as_tuple(call(**self.inputs))
        return lambda: torch.autograd.grad(outputs, leaves, self.upstream, retain_graph=True)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class Verdict:
    """How far a provider is from the truth, as |found - truth| / |truth|, how far it may be, and why it is refused."""

    error: float
    limit: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


def judge(problem: Problem) -> dict[str, Verdict]:
    """A verdict on each provider of ``problem``."""
    # Dropout masks are those of the whole problem; without them its parts know nothing of each other.
    define = _of_all if problem.undropped else _of_part
    truth = define(problem, problem.definition, torch.float64)
    errors = _errors(define(problem, problem.definition, problem.dtype), truth)
    # Twice the definition's own error, and a rounding: nothing is exact where the definition happens to be.
    limits = {name: 2 * error + torch.finfo(problem.dtype).eps / 2 for name, error in errors.items()}
    undropped = _of_part(problem, problem.undropped, torch.float64) if problem.own_masks else truth
    verdicts = {}
    for name, call in problem.providers.items():
        try:
            _poison([*problem.inputs.values(), *problem.upstream])
            found = _of_all(problem, call, problem.dtype)
        except Exception as error:  # a peer may refuse a shape with any exception
            verdicts[name] = Verdict(float("nan"), float("nan"), f"cannot run: {first_line(error)}")
            continue
        if name in problem.own_masks:
            verdicts[name] = _on_average(found["out 0"], truth["out 0"], undropped["out 0"])
        else:
            verdicts[name] = _exactly(_errors(found, truth), limits)
    return verdicts


def _exactly(errors: dict[str, float], limits: dict[str, float]) -> Verdict:
    worst = max(errors, key=lambda name: errors[name] / limits[name])
    error, limit = errors[worst], limits[worst]
    return Verdict(error, limit, "" if error <= limit else f"wrong: {worst} is off by {error:.1e}, allowed {limit:.1e}")


def _on_average(found: Tensor, dropped: Tensor, undropped: Tensor) -> Verdict:
    """With masks of its own a provider has to be right on average, and to change as much as the definition does."""
    found = found.double()
    mean = (found * undropped).sum().item() / undropped.square().sum().item()
    change = ((found - undropped).norm() / (dropped - undropped).norm()).item()
    if abs(mean - 1) < 0.05 and abs(change - 1) < 0.2:
        return Verdict(abs(mean - 1), 0.05)
    return Verdict(
        abs(mean - 1), 0.05, f"wrong: dropout gives {mean:.2f} times the mean, and {change:.2f} times the noise"
    )


def _of_all(problem: Problem, call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients, computed in ``dtype`` for the whole problem; the part of them that is compared."""
    inputs = {name: _in_dtype(x, dtype) for name, x in problem.inputs.items()}
    found = _results(call, inputs, problem.upstream)
    return {name: problem.part(x) if x.dim() else x for name, x in found.items()}


def _of_part(problem: Problem, call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients, computed in ``dtype`` for the part that is compared."""

    def cut(x: Tensor) -> Tensor:
        return problem.part(x) if x.dim() else x

    inputs = {name: _in_dtype(x, dtype, cut) for name, x in problem.inputs.items()}
    return _results(call, inputs, tuple(cut(d) for d in problem.upstream))


def _in_dtype(x: Tensor, dtype: torch.dtype, cut: Callable = lambda x: x) -> Tensor:
    """A leaf like x; numbers that are not floating keep their type."""
    leaf = cut(x.detach())
    return (leaf.to(dtype) if x.is_floating_point() else leaf).requires_grad_(x.requires_grad)


def _results(call: Call, inputs: dict[str, Tensor], upstream: tuple[Tensor, ...]) -> dict[str, Tensor]:
    outputs = as_tuple(call(**inputs))
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    upstream = tuple(d.to(out.dtype) for d, out in zip(upstream, outputs, strict=True))
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    found = {f"out {i}": out.detach() for i, out in enumerate(outputs)}
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """|found - truth| / |truth| of each; infinite for what is not a number."""
    errors = {}
    for name, exact in truth.items():
        error = ((found[name].double() - exact).norm() / exact.norm()).item()
        errors[name] = error if error == error else float("inf")
    return errors


def _poison(like: list[Tensor]) -> None:
    """Fill what the allocator will hand out next with NaN, so that what a provider leaves unwritten shows."""
    poisoned = [torch.full_like(x.detach(), float("nan")) for x in like if x.is_floating_point()]
    del poisoned
