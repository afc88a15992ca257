"""What a user or a machine can get wrong, one class a kind, each with the exit code it ends the process with.

A message gives what was found, what was needed and the way out. ``assert`` is for what only a bug can break.
"""


class MegaGPTError(Exception):
    """Base of every error whose message is meant for the user; it is shown without a traceback.

    It is one line, and what a stranger's file put into it cannot speak to the terminal: characters that are not
    printable stand there as escapes.
    """

    exit_code = 1

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class ConfigError(MegaGPTError):
    """A flag, a settings file or an environment that cannot be honoured."""

    exit_code = 2


class DataError(MegaGPTError):
    """Input text, a tokenizer or a tokenised corpus that cannot be used."""

    exit_code = 2


class CheckpointError(MegaGPTError):
    """No usable checkpoint where one is needed."""

    exit_code = 3


class PeerError(MegaGPTError):
    """Other ranks have not come or have ended."""

    exit_code = 4


class NumericError(MegaGPTError):
    """Training stopped because its numbers are no longer finite."""

    exit_code = 6


class StorageError(MegaGPTError):
    """The disk is full, read-only or gone."""

    exit_code = 7


class Stopped(MegaGPTError):
    """No error: the run was asked to stop, has saved and can go on; its last line has been said."""

    exit_code = 75


def nearest(name: str, known) -> str:
    """`` (did you mean 'x'?)`` when ``known`` has a name close to ``name``, else an empty string."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
