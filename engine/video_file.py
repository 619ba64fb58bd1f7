"""Pictures as a video: H.264 in an mp4, through PyAV, written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from hsrgan.engine.aside import written_aside
from hsrgan.engine.errors import CannotWrite, UserError
from hsrgan.engine.pictures import opaque

QUALITY = "16"  # x264's crf: 0 is lossless, 23 its default
MPEG4_BITS = 0.5  # a pixel, where this PyAV has no x264


def load_av() -> ModuleType:
    """PyAV. Raises `UserError` where it is not installed."""
    try:
        import av
    except ImportError:
        raise UserError('videos need PyAV, which is not installed: pip install "hsrgan[video]", or pip install av'
                        ) from None
    return av


def even(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] with even sides, as yuv420p needs them: an odd side's last pixels are repeated. Grey becomes RGB,
    and alpha is laid over a checkerboard.
    """
    pixels = np.asarray(opaque(picture).convert("RGB"))
    return np.pad(pixels, [(0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)], mode="edge")


@contextlib.contextmanager
def mp4(path: Path, fps: int) -> Iterator[VideoWriter]:
    """Yield a writer whose `add` takes one picture a frame, all of one size; `path` appears at the end, or never."""
    av = load_av()
    with written_aside(path) as aside:
        try:
            with av.open(str(aside), "w", format="mp4") as container:
                writer = VideoWriter(av, container, fps)
                yield writer
                writer.finish()
        except av.error.FFmpegError as error:  # an OSError for some errors, for others not
            raise CannotWrite(f"cannot write {path}: {error}; free space there or name another --out") from error


class VideoWriter:
    """The stream is opened by the first picture, which tells the size."""

    def __init__(self, av: ModuleType, container, fps: int) -> None:
        self._av, self._container, self._fps = av, container, fps
        self.codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._stream = None

    def add(self, picture: Image.Image) -> None:
        pixels = even(picture)
        if self._stream is None:
            self._stream = self._opened(*pixels.shape[:2])
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())

    def _opened(self, height: int, width: int):
        stream = self._container.add_stream(self.codec, rate=self._fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        if self.codec == "libx264":
            stream.options = {"crf": QUALITY}
        else:
            stream.bit_rate = round(height * width * self._fps * MPEG4_BITS)
        return stream
