"""One sample: its files decoded, or why it cannot be used."""

from __future__ import annotations

import io

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from hsrgan.engine.labels import Label, read_label, to_text
from hsrgan.engine.shards import Manifest
from hsrgan.engine.sizes import in_words
from hsrgan.engine.tar_index import read_fragment

PIL_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_READERS = {"png": PngImageFile, "jpg": JpegImageFile, "webp": WebPImageFile}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class BadSample(Exception):
    """A sample that cannot be used; the message goes on from "sample 3 of 00001.tar"."""


def decode(fragment: bytes, manifest: Manifest) -> tuple[np.ndarray, Label]:
    """Bytes of a sample in its tar -> (uint8 [H,W,C], its classes; () without labels). Raises `BadSample`."""
    try:
        files = read_fragment(fragment)
    except ValueError as error:
        raise BadSample(f"is damaged ({error})") from None
    data = files.get(manifest.image_format)
    if data is None:
        raise BadSample(f"has no .{manifest.image_format} image")
    height, width = manifest.resolution
    try:
        image = _READERS[manifest.image_format](io.BytesIO(data))  # Image.open takes 5 % of a small image's time
        if image.size != (width, height):
            found = in_words((image.height, image.width))
            raise BadSample(f"is {found}, its manifest says {in_words(manifest.resolution)}")
        if manifest.channels == 4 and image.mode == "RGB":  # as WebP stores what is opaque throughout
            image = image.convert("RGBA")
        if image.mode != _MODES[manifest.channels]:
            raise BadSample(f"is a {image.mode} image, its manifest says {manifest.channels} channel(s)")
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, manifest.channels)
    except BadSample:
        raise
    except Exception as error:  # a damaged image makes PIL raise nearly anything
        raise BadSample(f"is no whole {manifest.image_format} image ({error})") from None
    label = _label(files, manifest) if manifest.num_classes else ()
    return pixels, label


def _label(files: dict[str, bytes], manifest: Manifest) -> Label:
    try:
        label = read_label(files)
    except ValueError as error:
        raise BadSample(str(error)) from None
    if label and label[-1] >= manifest.num_classes:
        raise BadSample(f"has the label {to_text(label)}, its manifest says 0 to {manifest.num_classes - 1}")
    if len(label) != 1 and manifest.label_sets is None:
        raise BadSample(f"has {len(label)} classes, its manifest says one for each image")
    return label
