"""A packed data set: numbered WebDataset shards, sidecars for each, and a manifest.

    photos/
      00000.tar      tar of `<number>.png` (or jpg, webp) and, where there are labels, `<number>.cls`, or
                     `<number>.json` where an image may have several
      00000.npy      uint64 [count + 1]: byte offset of each sample's tar fragment, and the end of the last one
      00000.cls.npy  int32 [count], where every image has one class: that class. Older sets lack it, and
                     `tools/pack.py --verify` adds it
      …
      manifest.json

A folder with a `manifest.json` is complete and anything else is not: `shard_writer` writes them so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import ClassCounts, LabelSets, from_text
from hsrgan.engine.sizes import Resolution, in_words, plain, sides

if TYPE_CHECKING:
    from hsrgan.engine.shard_cache import ShardCache

FORMAT, MULTI_LABEL_FORMAT = "hsrgan-shards-1", "hsrgan-shards-2"
MANIFEST = "manifest.json"
IMAGE_FORMATS = ("png", "jpg", "webp")


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, samples in it, SHA-256 (hex) and size in bytes."""

    name: str
    count: int
    sha256: str
    bytes: int

    @property
    def offsets_name(self) -> str:
        return self.name.removesuffix(".tar") + ".npy"

    @property
    def classes_name(self) -> str:
        return self.name.removesuffix(".tar") + ".cls.npy"

    @property
    def file_names(self) -> tuple[str, str, str]:
        return self.name, self.offsets_name, self.classes_name


@dataclass(frozen=True)
class Manifest:
    """What a data set holds. `resolution` is (height, width), in the file as `sizes.plain` has it; `num_classes` is 0
    without labels; `sha256` is that of the manifest file itself and names the data set. class_counts: images that have
    each class. label_sets: of a multi-label data set, and of no other.

    root     folder of the shards, or its URL; for shards listed one by one, the list as the user wrote it
    index    folder of `<sha256>.npy` and `.cls.npy`, the sidecars of shards that are listed one by one, whose names
             are then complete
    cache    holds what is fetched from URLs
    max_bad  share of samples that may be unusable and are then replaced; 0 = none, the first one is an error
    """

    root: Path | str
    resolution: tuple[int, int]
    channels: int
    count: int
    image_format: str
    source: str
    num_classes: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]
    sha256: str
    label_sets: LabelSets | None = None
    index: Path | None = None
    cache: ShardCache | None = field(default=None, compare=False, repr=False)
    max_bad: float = 0.0

    def location(self, shard: Shard) -> str:
        """Path or URL of a shard."""
        if self.index is not None:
            return shard.name
        if isinstance(self.root, str):
            return f"{self.root}/{urllib.parse.quote(shard.name)}"
        return str(self.root / shard.name)

    def offsets_path(self, shard: Shard) -> Path:
        """Of a shard on this machine."""
        return self.index / f"{shard.sha256}.npy" if self.index is not None else self.root / shard.offsets_name

    def classes_path(self, shard: Shard) -> Path:
        """Of a shard on this machine."""
        return self.index / f"{shard.sha256}.cls.npy" if self.index is not None else self.root / shard.classes_name

    @property
    def drawn_labels(self) -> ClassCounts:
        """What labels are drawn from."""
        return self.label_sets or self.class_counts

    def expect(self, *, resolution: Resolution, channels: int, labels: bool) -> None:
        """Raise `UserError` unless these shards are what a recipe asks for."""
        if self.resolution != sides(resolution):
            option = "x".join(map(str, dict.fromkeys(sides(resolution))))
            raise UserError(
                f"{self.root} holds {in_words(self.resolution)} images but data.resolution is {plain(resolution)}: "
                f"pack with tools/pack.py --resolution {option}, or set data.resolution={plain(self.resolution)}"
            )
        if self.channels != channels:
            raise UserError(
                f"{self.root} holds images of {self.channels} channel(s) but data.channels is {channels}: "
                f"pack with tools/pack.py --channels {channels}, or set data.channels={self.channels}"
            )
        if labels and not self.num_classes:
            raise UserError(
                f"{self.root} holds no labels but data.labels is true: "
                "pack with tools/pack.py --labels, or set data.labels=false"
            )


def load_manifest(path: str | os.PathLike) -> Manifest:
    """Read the manifest of a packed data set, by its folder or its manifest.json. A bad one raises `UserError`."""
    path = Path(path)
    file = path if path.is_file() or path.suffix == ".json" else path / MANIFEST
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        if file.with_name(file.name + ".part").exists():
            raise UserError(f"packing into {file.parent} is not finished: run the same tools/pack.py again") from None
        raise UserError(f"there is no {file}: make it with tools/pack.py SOURCE {file.parent}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return parse_manifest(raw, file.parent, file)


def parse_manifest(raw: bytes, root: Path | str, file: Path | str) -> Manifest:
    """The manifest `raw`, whose shards lie in `root`; `file` is how an error names it."""
    try:
        return _parse(raw, root)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} is damaged ({reason}): copy it again, or pack the data set again") from None


def _parse(raw: bytes, root: Path | str) -> Manifest:
    data = json.loads(raw)
    if data["format"] not in (FORMAT, MULTI_LABEL_FORMAT):
        raise ValueError(f"format {data['format']!r} is not {FORMAT!r} or {MULTI_LABEL_FORMAT!r}")
    labels = data["labels"]
    sets = {from_text(text): int(count) for text, count in labels.get("sets", {}).items()}
    manifest = Manifest(
        root=root,
        resolution=sides(data["resolution"], "resolution"),
        channels=int(data["channels"]),
        count=int(data["count"]),
        image_format=data["encoding"]["format"],
        source=str(data["source"]),
        num_classes=int(labels["num_classes"]),
        class_names=tuple(labels["class_names"]),
        class_counts=tuple(int(count) for count in labels["class_counts"]),
        shards=tuple(Shard(str(s["name"]), int(s["count"]), str(s["sha256"]), int(s["bytes"])) for s in data["shards"]),
        sha256=hashlib.sha256(raw).hexdigest(),
        label_sets=LabelSets(int(labels["num_classes"]), tuple(sets), tuple(sets.values())) if sets else None,
    )
    if manifest.image_format not in IMAGE_FORMATS:
        raise ValueError(f"image format {manifest.image_format!r} is not one of {', '.join(IMAGE_FORMATS)}")
    if manifest.count < 1 or sum(shard.count for shard in manifest.shards) != manifest.count:
        raise ValueError(f"its shards do not add up to {manifest.count} images")
    for shard in manifest.shards:  # names are of files beside the manifest; the hash names the file in a cache
        if shard.count < 1 or not re.fullmatch(r"[^/\\:]+\.tar", shard.name):
            raise ValueError("a shard is empty or misnamed")
        if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
            raise ValueError(f"{shard.name} has no SHA-256")
    if not len(manifest.class_names) == len(manifest.class_counts) == manifest.num_classes:
        raise ValueError(f"it does not name and count its {manifest.num_classes} classes")
    if any(label and label[-1] >= manifest.num_classes for label in sets):
        raise ValueError(f"a set of labels has a class above {manifest.num_classes - 1}")
    if sets and (sum(sets.values()) != manifest.count or manifest.label_sets.class_counts != manifest.class_counts):
        raise ValueError("its sets of labels do not add up")
    return manifest
