"""One sample: its files decoded, or why it cannot be used."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from hsrgan.engine.shards import Manifest
from hsrgan.engine.sizes import in_words
from hsrgan.engine.tar_index import read_fragment

PIL_FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class BadSample(Exception):
    """A sample that cannot be used; the message goes on from "sample 3 of 00001.tar"."""


def decode(fragment: bytes, manifest: Manifest) -> tuple[np.ndarray, int]:
    """Bytes of a sample in its tar -> (uint8 [H,W,C], class; -1 without labels). Raises `BadSample`."""
    try:
        files = read_fragment(fragment)
    except ValueError as error:
        raise BadSample(f"is damaged ({error})") from None
    data = files.get(manifest.image_format)
    if data is None:
        raise BadSample(f"has no .{manifest.image_format} image")
    try:
        image = Image.open(io.BytesIO(data), formats=[PIL_FORMATS[manifest.image_format]])
        image.load()
    except Exception as error:  # a damaged image makes PIL raise nearly anything
        raise BadSample(f"is no whole {manifest.image_format} image ({error})") from None
    height, width = manifest.resolution
    if image.size != (width, height):
        found = in_words((image.height, image.width))
        raise BadSample(f"is {found}, its manifest says {in_words(manifest.resolution)}")
    if manifest.channels == 4 and image.mode == "RGB":  # as WebP stores what is opaque throughout
        image = image.convert("RGBA")
    if image.mode != _MODES[manifest.channels]:
        raise BadSample(f"is a {image.mode} image, its manifest says {manifest.channels} channel(s)")
    label = -1
    if manifest.num_classes:
        text = files.get("cls", b"").strip()
        label = int(text) if text.isdigit() else -1
        if not 0 <= label < manifest.num_classes:
            raise BadSample(f"has the label {text!r}, its manifest says 0 to {manifest.num_classes - 1}")
    return np.asarray(image).reshape(height, width, manifest.channels), label
