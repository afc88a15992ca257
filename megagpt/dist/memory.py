"""Want of memory: whether the kernel has killed for it, and what a process that was refused some can do."""

from pathlib import Path

_COUNTER = Path("/proc/vmstat")
_REFUSED = ("out of memory", "can't allocate memory", "Cannot allocate memory")  # CUDA, torch on a CPU, the system
WAYS_OUT = (
    "out of memory: take a smaller --micro_batch_size, --activation_checkpointing 1, a higher ZeRO stage or offload; "
    "megagpt plan tells what fits"
)


def kills() -> int | None:
    """How many processes of this host the kernel has killed for want of memory so far; None where it doesn't tell."""
    try:
        words = _COUNTER.read_text(encoding="ascii").split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError, IndexError):
        return None


def killed_since(before: int | None) -> bool:
    """Whether the kernel is known to have done so since :func:`kills` gave ``before``."""
    now = kills()
    return before is not None and now is not None and now > before


def was_refused(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of a GPU or of the host."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in _REFUSED)
