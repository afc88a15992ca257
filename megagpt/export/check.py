"""Whether transformers computes from an exported folder what this model computes, in float32 on the CPU."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagpt.data.tokenizer import Tokenizer
from megagpt.errors import CheckpointError
from megagpt.model.config import GPTConfig

TOLERANCE = 1e-4
_LONGEST = 256  # positions: enough for every block to mix, and seconds on a CPU with a model of a billion parameters
_SHORT = 17
TEXT = """It was a dark night, and the rain fell in torrents, except at occasional intervals, when it was checked by a
violent gust of wind which swept up the streets. "Who's there?" she asked; nobody answered. In 1911 the expedition of
34 men reached the coast at 77.5 degrees south, and by the 14th of December five of them stood at the pole.

def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # of at least one number

La nuit était sombre; les étoiles brillaient. Die Straße ist naß, und es regnet noch immer. Привет, мир! 你好,世界。
"""


@dataclass(frozen=True)
class Comparison:
    """The largest difference of two logits, over how many windows of how many tokens in all, and whose."""

    difference: float
    n_windows: int
    n_tokens: int
    version: str  # of transformers


def windows(tokenizer: Tokenizer, config: GPTConfig, *, task_tokens: bool = False) -> list[list[int]]:
    """Ids to compare on: real text, long and short, and a sample of the whole vocabulary.

    With ``task_tokens``, the last three rows, a text is set between the first and the last of these.
    """
    rows = config.vocab_size - 3 * task_tokens
    room = config.seq_len - 2 * task_tokens
    text = tokenizer.encode(TEXT) or list(range(min(rows, _LONGEST)))
    longest = min(_LONGEST, room)
    found = [
        (text * math.ceil(longest / len(text)))[:longest],
        text[-min(_SHORT, room) :],
        torch.linspace(0, rows - 1, min(64, room)).long().tolist(),
    ]
    return [[rows, *ids, rows + 2] for ids in found] if task_tokens else found


def compare(
    folder: Path, auto_class: str, ours: Callable[[], Callable[[list[int]], Tensor]], chosen: list[list[int]]
) -> Comparison | None:
    """Compare on the ``chosen`` windows; None where transformers is not installed.

    ``ours`` loads this model and gives the function from ids to logits. One model is in memory at a time. Raises
    CheckpointError where the difference is above the tolerance, or where transformers does not load the folder.
    """
    try:
        import transformers
    except ImportError:
        return None
    with torch.no_grad():
        logits = ours()
        expected = [logits(ids) for ids in chosen]
        del logits
        with _quiet(transformers):
            theirs = _load(transformers, folder, auto_class)
            found = [theirs(input_ids=torch.tensor([ids])).logits[0] for ids in chosen]
    differences = [(a - b).abs().max() for a, b in zip(expected, found, strict=True)]
    difference = torch.stack(differences).max().item()  # not Python's max, which may pass over a nan
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the logits of the exported model differ by up to {difference:.1e} from this one's in transformers "
            f"{transformers.__version__}, and {TOLERANCE:.0e} is allowed; nothing was kept"
        )
    return Comparison(difference, len(chosen), sum(map(len, chosen)), transformers.__version__)


def check_tokenizer(folder: Path, tokenizer: Tokenizer, *, task_tokens: tuple[int, int] | None = None) -> None:
    """Raise CheckpointError where AutoTokenizer gives other ids; ``task_tokens`` are those before and behind a text."""
    try:
        import transformers
    except ImportError:
        return
    with _quiet(transformers), _load_errors(transformers):
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        found = theirs(TEXT, verbose=False)["input_ids"]
    ids = tokenizer.encode(TEXT)
    expected = ids if task_tokens is None else [task_tokens[0], *ids, task_tokens[1]]
    if found != expected:
        raise CheckpointError(
            "transformers' AutoTokenizer gives other ids than the model's tokenizer; nothing was kept"
        )


def _load(transformers, folder: Path, auto_class: str):
    with _load_errors(transformers):
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    amiss = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if amiss:
        raise CheckpointError(f"transformers {transformers.__version__} finds these weights amiss: {str(amiss)[:300]}")
    return model.eval()


@contextlib.contextmanager
def _load_errors(transformers):
    try:
        yield
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"transformers {transformers.__version__} does not load the exported folder: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet(transformers):
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()
