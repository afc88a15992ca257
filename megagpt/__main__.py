"""``python -m megagpt``: the ``megagpt`` command, where its folder is not on the path."""

import sys

from megagpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
