"""A disk that can lose its power: what was forced to it stays, and any of the rest."""

from collections.abc import Callable
from dataclasses import dataclass

from disk_recorder import Recording


@dataclass
class File:
    """A file's bytes on disk for certain; where it is ``open`` there may be others in memory only."""

    forced: bytes = b""
    is_open: bool = False
    stays_open: bool = False  # a log that is appended to


@dataclass
class Change:
    """Of names, in memory only: ``node`` goes from one (folder, name) to another; None is nowhere."""

    at: int
    node: int
    old: tuple[int, str] | None
    new: tuple[int, str] | None

    def apply(self, names: dict[int, dict[str, int]]) -> None:
        if self.old and names[self.old[0]].get(self.old[1]) == self.node:
            del names[self.old[0]][self.old[1]]
        if self.new:
            names[self.new[0]][self.new[1]] = self.node

    def concerns(self, folder: int) -> bool:
        return any(place and place[0] == folder for place in (self.old, self.new))


class Disk:
    """Names and files as programs see them, and which of it is on disk for certain."""

    def __init__(self, recording: Recording) -> None:
        self.files: dict[int, File] = {}
        self.now: dict[int, dict[str, int]] = {0: {}}  # what each folder holds
        self.on_disk: dict[int, dict[str, int]] = {0: {}}
        self.pending: list[Change] = []
        self.forced: dict[int, list[tuple[int, bytes]]] = {}  # (time, bytes) of each fsync of a file
        self._contents = recording.contents
        for path in sorted(recording.folders_before):
            self._add(path, 0)
        for path, data in recording.before.items():
            self.files[self._add(path, 0, is_file=True)].forced = data
        self.on_disk = {node: dict(names) for node, names in self.now.items()}
        self.pending.clear()

    def _place(self, path: str) -> tuple[int, str]:
        *parents, name = path.split("/")
        node = 0
        for parent in parents:
            node = self.now[node][parent]
        return node, name

    def _has_parent(self, path: str) -> bool:
        parent = path.rpartition("/")[0]
        return not parent or self._find(parent) in self.now

    def _find(self, path: str) -> int | None:
        try:
            parent, name = self._place(path)
        except KeyError:
            return None
        return self.now[parent].get(name)

    def _change(self, *what) -> None:
        change = Change(*what)
        change.apply(self.now)
        self.pending.append(change)

    def _add(self, path: str, at: int, *, is_file: bool = False) -> int:
        node = len(self.files) + len(self.now)
        if is_file:
            self.files[node] = File()
        else:
            self.now[node], self.on_disk[node] = {}, {}
        self._change(at, node, None, self._place(path))
        return node

    def do(self, event: dict) -> None:
        """One recorded operation."""
        op, path, at = event["op"], event["path"], event["at"]
        if not all(self._has_parent(p) for p in (path, event.get("to") or ".")):
            return  # the call failed
        node = 0 if path == "." else self._find(path)
        if op == "mkdir" and node is None:
            self._add(path, at)
        elif op == "open":
            file = self.files[self._add(path, at, is_file=True) if node is None else node]
            file.is_open, file.stays_open = True, event["append"]
            file.forced = file.forced if event["append"] else b""
        elif op in ("remove", "rmdir") and node is not None:
            self._change(at, node, self._place(path), None)
        elif op == "rename" and node is not None:
            self._change(at, node, self._place(path), self._place(event["to"]))
        elif op == "sync" and event["content"] is not None:
            file = self.files[node]
            file.forced, file.is_open = self._contents[event["content"]], file.stays_open
            self.forced.setdefault(node, []).append((at, file.forced))
        elif op == "sync":
            self._sync_folder(node, event["began"])

    def _sync_folder(self, node: int, began: int) -> None:
        """What was changed in this folder before is on disk; a rename is one thing, on both sides."""
        done = [change for change in self.pending if change.at < began and change.concerns(node)]
        for change in done:
            change.apply(self.on_disk)
        self.pending = [change for change in self.pending if change not in done]

    def crash(self, keep: list[bool], bytes_of: Callable[[int, File], bytes]) -> dict[str, bytes]:
        """What is left, as {path: bytes}, where these of the pending changes were kept.

        ``bytes_of`` says what an open file holds; a folder has a slash at its end.
        """
        names = {node: dict(entries) for node, entries in self.on_disk.items()}
        for change, kept in zip(self.pending, keep, strict=True):
            if kept:
                change.apply(names)
        found: dict[str, bytes] = {}
        folders = [(0, "")]
        for node, prefix in folders:
            for name, child in names[node].items():
                if child in self.files:
                    file = self.files[child]
                    found[prefix + name] = bytes_of(child, file) if file.is_open else file.forced
                else:
                    found[f"{prefix}{name}/"] = b""
                    folders.append((child, f"{prefix}{name}/"))
        return found
