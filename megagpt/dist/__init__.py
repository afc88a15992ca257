"""Several processes as one program: who they are, what only one of them says, and how they fail together."""

from megagpt.dist.failures import everywhere, run_main
from megagpt.dist.gather import gather_json
from megagpt.dist.guard import beat, watch
from megagpt.dist.hostlist import expand_hostlist, expand_tasks
from megagpt.dist.world import World, export, is_main, resolve_world

__all__ = [
    "World",
    "beat",
    "everywhere",
    "expand_hostlist",
    "expand_tasks",
    "export",
    "gather_json",
    "is_main",
    "resolve_world",
    "run_main",
    "watch",
]
