"""Cutting TensorBoard's event files back to the checkpoint that a run resumes from.

TensorBoard's own way, a purge event, drops points by their x and would tear the classic tags, whose x is samples and
not steps. Events stand in the order in which they were written, so the file is cut at the first one to be repeated.
A record is an 8-byte little-endian length, 4 bytes of its checksum, the Event, 4 bytes of its checksum.
"""

import struct
from pathlib import Path

_SAMPLES = "Train/Samples/"  # DeepSpeed's classic tags; every other tag of ours counts steps


def truncate(folder: Path, last_step: int) -> None:
    """Cut every event file under ``folder`` at its first scalar of a step after ``last_step``."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        end = _end_of(path, last_step)
        if end < path.stat().st_size:
            with open(path, "r+b") as file:
                file.truncate(end)


def _end_of(path: Path, last_step: int) -> int:
    """The offset of the first record of a later step, of a torn or damaged record, or of the file's end."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    with open(path, "rb") as file:
        while True:
            start = file.tell()
            header = file.read(12)
            length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else None
            if length is None or length > path.stat().st_size:
                return start
            body = file.read(length)
            if len(body) < length or len(file.read(4)) < 4:
                return start
            try:
                event = Event.FromString(body)
            except DecodeError:
                return start
            steps = any(not value.tag.startswith(_SAMPLES) for value in event.summary.value)
            if steps and event.step > last_step:
                return start
