"""The version, alone in a module that imports nothing, so that ``megagpt --version`` answers at once."""

__version__ = "0.1.0"
