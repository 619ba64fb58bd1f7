"""TensorBoard's event file, written where it is asked for: a disk that refuses is the caller's OSError.

torch's SummaryWriter hands events to a thread, in which a full disk ends in a traceback and in nothing else.
"""

from __future__ import annotations

import io
import os
import socket
import time
from pathlib import Path

import numpy as np


class Board:
    """A new event file in `folder`, which is made if absent. Steps from `purge_step` on that earlier files hold count
    no longer. Raises OSError where the disk refuses, here and in every method; the file then ends with its last whole
    event, and later ones can still be added.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._whole = 0  # bytes of whole events
        self._add(step=purge_step, file_version="brain.Event:2")
        self._add(step=purge_step, session_log={"status": "START"})

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add(step=step, summary={"value": [{"tag": tag, "simple_value": v} for tag, v in values.items()]})

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """pixels: uint8 [H, W] or [H, W, C]."""
        from torch.utils.tensorboard.summary import image

        self._add(step=step, summary=image(tag, pixels, dataformats="HW" if pixels.ndim == 2 else "HWC"))

    def text(self, tag: str, words: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text

        self._add(step=step, summary=text(tag, words))

    def close(self) -> None:
        self._file.close()

    def _add(self, **fields: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        rest = memoryview(record.getvalue())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._whole)  # a torn event would hide all that follow it
            self._file.seek(self._whole)
            raise
        self._whole += record.tell()
