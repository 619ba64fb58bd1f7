"""Small packed data sets for tests."""

import io

import numpy as np
from PIL import Image

from hsrgan.engine import samples, shard_writer, shards

COUNT, SHARD_SIZE = 103, 10  # ten whole shards and one of 3: uneven


def encode(image, image_format="png"):
    out = io.BytesIO()
    Image.fromarray(image).save(out, samples.PIL_FORMATS[image_format], quality=90)
    return out.getvalue()


def picture(i):
    """4×4 RGB whose left half says its number + 1 in red and whose right half is blue, so that a flip shows."""
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, :2, 0], image[:, 2:, 2] = i + 1, 200
    return image


def pack(folder, count=COUNT, classes=5, picture=picture, **options):
    options = {"resolution": (4, 4), "channels": 3, "shard_size": SHARD_SIZE} | options
    with shard_writer.ShardWriter(folder, class_names=[f"c{k}" for k in range(classes)], **options) as writer:
        for i in range(count):
            writer.add(encode(picture(i), options.get("image_format", "png")), i % classes if classes else None)
    return shards.load_manifest(folder)


def numbers(images):
    return (images[:, 0].amax((1, 2)) - 1).tolist()
