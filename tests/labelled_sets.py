"""Packed data sets with labels, for tests."""

import json

import numpy as np
import torch
from forked import RECIPE
from shard_fixtures import encode
from test_pack import folder, run

from hsrgan.engine import shard_writer, shards
from hsrgan.engine.config import load_recipe

CPU = torch.device("cpu")
SETS = [(0, 2), (), (1,), (0, 1, 2)]  # of image i: SETS[i % 4]


def write_labels(source, given):
    """A dataset.json that gives the images of `source`, in order of their names, these labels."""
    names = sorted(path.relative_to(source).as_posix() for path in source.rglob("*.png"))
    rows = [[name, label] for name, label in zip(names, given, strict=True)]
    (source / "dataset.json").write_text(json.dumps({"labels": rows}))


def pack_several(root):
    """What packing said, and a multi-label set of 20 images: image i is grey, 4·i, in classes SETS[i % 4] of 3."""
    source = folder(root / "src", [f"{i:02d}.png" for i in range(20)])
    write_labels(source, [list(SETS[i % 4]) for i in range(20)])
    return run(source, root / "dst", "--shard-size", 8)


def pack_uneven(root):
    """100 images of class 0, 10 of class 2 and none of class 1, mixed in shards of 11; image i says i + 1 in red."""
    writer = shard_writer.ShardWriter(root, resolution=(4, 4), channels=3, class_names=["a", "b", "c"], shard_size=11)
    with writer:
        for i in range(110):
            pixels = np.zeros((4, 4, 3), np.uint8)
            pixels[:, :2, 0] = i + 1
            writer.add(encode(pixels), 0 if i % 11 else 2)
    return shards.load_manifest(root)


def recipe(folder, *overrides, text=RECIPE):
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml", overrides)
