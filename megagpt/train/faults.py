"""Named places at which a test makes a run fail: killed, out of disk, slow. Without its variable nothing happens.

MEGAGPT_FAULT is ``PLACE[:RANK[:COUNT[:ACTION]]]``: at the COUNT-th passage (1 without it, 0 for every one) of PLACE on
RANK (any without it), do ACTION: ``kill`` (the default), the name of an error of the disk such as ENOSPC, or
``sleep0.1`` with a number of seconds. ``*`` is every place.
"""

import errno
import os
import signal
import threading
import time
from collections import Counter

VARIABLE = "MEGAGPT_FAULT"
# In the order of a save; the ranks on which a place is passed are all, or rank 0 alone.
EVERY_RANK = ("save_begun", "file_opened", "file_written", "file_synced", "shards_written", "rank_done", "ranks_agreed")
RANK_0 = (
    "folder_made",
    "state_written",
    "manifest_written",
    "manifest_synced",
    "renamed",
    "committed",
    "latest_written",
    "prune_renamed",
    "pruned",
)
MIRROR = ("mirror_file_copied",)  # on rank 0's copying thread
_passed: Counter = Counter()
_counting = threading.Lock()


def point(place: str) -> None:
    """Do here what MEGAGPT_FAULT says; raises OSError where that is an error of the disk."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    name, rank, count, action = (*wanted.split(":"), "", "", "")[:4]
    if name not in (place, "*") or rank not in ("", os.environ.get("RANK", "0")):
        return
    with _counting:  # files are written by threads
        _passed[name] += 1
        due = int(count or 1) in (0, _passed[name])
    if due:
        _act(action or "kill")


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action.startswith("sleep"):
        time.sleep(float(action.removeprefix("sleep")))
    else:
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code))
