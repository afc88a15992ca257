"""Updates that must not count: a loss or gradient that is not finite, a loss that leaps, and what follows from them."""

from collections import deque

import torch
from torch import Tensor

from megagpt.config.deepspeed import ResolvedConfig
from megagpt.errors import NumericError
from megagpt.train.engine import loss_scale, mean_over_ranks

_MAX_SKIPPED = 10  # bad updates in a row after which a run stops
_WINDOW, _MAX_IN_WINDOW = 100, 30  # ... and among the last hundred
_MEMORY = 0.98  # of the running mean that a loss is compared with: about its last fifty values


class Numbers:
    """Judges every update of a run; all ranks come to the same judgement.

    ``on_nan`` is what a bad update leads to: "skip" leaves it out until there are too many, "stop" ends the run, and
    with "rewind" it is the loop that goes back. Fp16 finds its loss scale by overflowing: such an update is left out
    too, and is not bad. With ``spike_factor`` a loss above so many times its running mean is bad; the mean and the
    number of bad updates are part of ``state``.
    """

    def __init__(self, engine, config: ResolvedConfig, state, *, on_nan: str, spike_factor: float | None) -> None:
        self._engine = engine
        self._state = state
        self._stops = on_nan == "stop"
        self._spike_factor = spike_factor
        fp16 = config.config.get("fp16", {})
        # A scale that is fixed, or has nowhere left to go, searches for nothing.
        self._lowest_scale = float("inf") if fp16.get("loss_scale") else float(fp16.get("min_loss_scale", 1))
        self._loss: float | None = None  # over all ranks, where spikes are looked for
        self._before: tuple[int, float | None] = (0, None)
        self.is_spike = False
        self.is_bad = False  # the last update
        self.start_counting()

    def start_counting(self) -> None:
        """Forget the updates so far: none of them counts from here on."""
        self._in_a_row = 0
        self._lately: deque[bool] = deque(maxlen=_WINDOW)

    @property
    def in_trouble(self) -> bool:
        """Whether the last updates were bad: the run may be lost."""
        return self._in_a_row > 0

    def before_update(self) -> None:
        self.is_spike = False
        self._before = self._engine.skipped_steps, loss_scale(self._engine)

    def refuse_spike(self, micro_loss: Tensor, mean: Tensor) -> Tensor:
        """The last micro-batch's loss, or NaN in its place where ``mean``, this rank's over its part, has leapt.

        The engine then skips the update in every ZeRO stage and precision. This waits for the forward pass.
        """
        if self._spike_factor is None:
            return micro_loss
        self._loss = float(mean_over_ranks(mean.detach().float().clone()))
        typical = self._state.typical_loss
        self.is_spike = typical is not None and self._spike_factor * typical < self._loss < float("inf")
        return micro_loss * float("nan") if self.is_spike else micro_loss

    def judge(self, loss: Tensor) -> bool:
        """Whether the update that was just tried was skipped; ``is_bad`` then says whether that is a bad sign.

        ``loss`` is this rank's mean.
        """
        skipped_before, scale = self._before
        skipped = self._engine.skipped_steps > skipped_before
        self.is_bad = skipped and not self._searches(scale, loss)
        self._in_a_row = self._in_a_row + 1 if self.is_bad else 0
        self._lately.append(self.is_bad)
        self._state.nan_steps += self.is_bad
        if not skipped and self._loss is not None and self._loss < float("inf"):
            typical = self._state.typical_loss
            self._state.typical_loss = self._loss if typical is None else _MEMORY * typical + (1 - _MEMORY) * self._loss
        return skipped

    def what(self) -> str:
        """What was wrong with the last update."""
        if self.is_spike:
            return f"the loss leapt to {self._loss:.4g} from about {self._state.typical_loss:.4g}"
        return "gradients were not finite"

    def _searches(self, scale: float | None, loss: Tensor) -> bool:
        """Whether an update was skipped only because fp16's loss scale is still too high."""
        if scale is None or scale <= self._lowest_scale or self.is_spike:
            return False
        return bool(torch.isfinite(mean_over_ranks(loss.detach().float().clone())))

    def stop_if_due(self) -> None:
        """Raise NumericError where the run is to stop."""
        step = f"step {self._state.step}"
        if self._stops and self.is_bad:
            raise NumericError(
                f"{step}: {self.what()} and --on_nan is stop; look at the samples, lower --lr, or go on from the "
                "last checkpoint with --on_nan skip"
            )
        how_many = f"{_MAX_SKIPPED} updates in a row" if self._in_a_row >= _MAX_SKIPPED else None
        if sum(self._lately) >= _MAX_IN_WINDOW:
            how_many = how_many or f"{_MAX_IN_WINDOW} of the last {_WINDOW} updates"
        if how_many:
            raise NumericError(
                f"{step}: {how_many} had gradients that are not finite{' or losses that leapt' * bool(self._loss)} and "
                "were skipped; lower --lr, lengthen --warmup_steps or look at the data, and resume from the last "
                "checkpoint"
            )
