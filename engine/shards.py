"""A packed data set: numbered WebDataset shards, one sidecar of offsets each, and a manifest.

    photos/
      00000.tar   tar of `<number>.png` (or jpg, webp) and, where there are labels, `<number>.cls`
      00000.npy   uint64 [count + 1]: byte offset of each sample's tar fragment, and the end of the last one
      …
      manifest.json

A shard is written as `.part` and renamed when it is whole. `manifest.json.part` exists from the first byte of packing
and becomes `manifest.json` as the last step, so a folder with a `manifest.json` is complete and anything else is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset as wds

from hsrgan.engine.errors import UserError

FORMAT = "hsrgan-shards-1"
MANIFEST = "manifest.json"
IMAGE_FORMATS = ("png", "jpg", "webp")
_OURS = re.compile(r"\d{5,}\.(tar|npy)(\.part)?|manifest\.json(\.part)?")


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


@dataclass(frozen=True)
class Manifest:
    """What a packed data set holds. `resolution` is (height, width); `num_classes` is 0 without labels; `sha256` is
    that of the manifest file itself and names the data set."""

    root: Path
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

    def expect(self, *, resolution: int, channels: int, labels: bool) -> None:
        """Raise `UserError` unless these shards are what a recipe asks for."""
        height, width = self.resolution
        if (height, width) != (resolution, resolution):
            raise UserError(
                f"{self.root} holds {width}x{height} images but data.resolution is {resolution}: "
                f"pack with tools/pack.py --resolution {resolution}, or set data.resolution to that of the shards"
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
    file = path / MANIFEST if path.is_dir() else path
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        if file.with_name(file.name + ".part").exists():
            raise UserError(f"packing into {file.parent} is not finished: run the same tools/pack.py again") from None
        raise UserError(f"there is no {file}: make it with tools/pack.py SOURCE {file.parent}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    try:
        return _parse(raw, file.parent)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{file} is damaged ({reason}): copy it again, or pack the data set again") from None


def _parse(raw: bytes, root: Path) -> Manifest:
    data = json.loads(raw)
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']!r} is not {FORMAT!r}")
    labels = data["labels"]
    height, width = data["resolution"]
    manifest = Manifest(
        root=root,
        resolution=(int(height), int(width)),
        channels=int(data["channels"]),
        count=int(data["count"]),
        image_format=data["encoding"]["format"],
        source=str(data["source"]),
        num_classes=int(labels["num_classes"]),
        class_names=tuple(labels["class_names"]),
        class_counts=tuple(int(count) for count in labels["class_counts"]),
        shards=tuple(Shard(str(s["name"]), int(s["count"]), str(s["sha256"]), int(s["bytes"])) for s in data["shards"]),
        sha256=hashlib.sha256(raw).hexdigest(),
    )
    if manifest.image_format not in IMAGE_FORMATS:
        raise ValueError(f"image format {manifest.image_format!r} is not one of {', '.join(IMAGE_FORMATS)}")
    if manifest.count < 1 or sum(shard.count for shard in manifest.shards) != manifest.count:
        raise ValueError(f"its shards do not add up to {manifest.count} images")
    if any(shard.count < 1 or not re.fullmatch(r"[^/\\]+\.tar", shard.name) for shard in manifest.shards):
        raise ValueError("a shard is empty or misnamed")
    if not len(manifest.class_names) == len(manifest.class_counts) == manifest.num_classes:
        raise ValueError(f"it does not name and count its {manifest.num_classes} classes")
    return manifest


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold `folder` (made if missing) against other packers on this machine; the kernel frees it however we end.

    Without `wait`, a folder held by another process raises `UserError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"another process is packing into {folder}: wait, or choose another folder") from None
        yield


class _Hashing:
    """A file to write to that knows the SHA-256 of what went through it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)


class ShardWriter:
    """Write encoded images as shards, in the order given, and the manifest at the end. A context manager.

    resolution   (height, width) of every image; channels 1 or 3. Both are recorded, not checked.
    image_format png, jpg or webp: how the images given to `add` are encoded; `quality` is recorded beside it.
    class_names  one name a class, or () for no labels.
    shard_size   images per shard.
    source       where the images came from, in words, for the manifest.
    force        replace a complete data set; without it one is refused with `UserError`.

    Left normally, the folder is complete. Left by an exception, what was written is removed. A killed process leaves
    `.part` files and no manifest, and the next writer removes them. Hold `folder_lock` around it if others may write.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        resolution: tuple[int, int],
        channels: int,
        image_format: str = "png",
        quality: int | None = None,
        class_names: Sequence[str] = (),
        shard_size: int = 1000,
        source: str = "",
        force: bool = False,
    ):
        self.folder = Path(folder)
        self.image_format = image_format
        self.shard_size = shard_size
        self._class_counts = [0] * len(class_names)
        self._head = {
            "format": FORMAT,
            "source": source,
            "resolution": list(resolution),
            "channels": channels,
            "encoding": {"format": image_format, "quality": quality},
        }
        self._class_names = list(class_names)
        self._shards: list[Shard] = []
        self.count = 0
        self._tar: wds.TarWriter | None = None
        check_target(self.folder, force=force)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark = self.folder / (MANIFEST + ".part")
        if (self.folder / MANIFEST).exists():
            os.replace(self.folder / MANIFEST, self._mark)
        self._mark.touch()
        self._remove_shards()

    def _remove_shards(self) -> None:
        for file in self.folder.iterdir():
            if file != self._mark and _OURS.fullmatch(file.name):
                file.unlink()

    def add(self, image: bytes, label: int | None = None) -> None:
        """Append one encoded image, with its class when the data set has classes."""
        if (label is not None) != bool(self._class_names):
            raise ValueError("a data set has a label for every image or for none")
        if self._tar is None:
            name = self.folder / f"{len(self._shards):05d}.tar"
            self._file = open(f"{name}.part", "wb")  # noqa: SIM115  (closed in _end_shard, or by abort)
            self._sink = _Hashing(self._file)
            # An int mtime: a float one, or none, costs a PAX header a file.
            self._tar = wds.TarWriter(self._sink, mtime=0, encoder=False)
            self._offsets = [0]
        sample = {"__key__": f"{self.count:08d}", self.image_format: image}
        if label is not None:
            sample["cls"] = str(label).encode()
            self._class_counts[label] += 1
        self._tar.write(sample)
        self._offsets.append(self._tar.tarstream.offset)
        self.count += 1
        if len(self._offsets) > self.shard_size:
            self._end_shard()

    def _end_shard(self) -> None:
        self._tar.close()
        self._tar = None
        size = self._file.tell()
        self._sync_and_close()
        name = f"{len(self._shards):05d}"
        with open(self.folder / f"{name}.npy.part", "wb") as file:
            np.save(file, np.array(self._offsets, np.uint64))
        os.replace(self.folder / f"{name}.npy.part", self.folder / f"{name}.npy")
        os.replace(self.folder / f"{name}.tar.part", self.folder / f"{name}.tar")
        self._shards.append(Shard(f"{name}.tar", len(self._offsets) - 1, self._sink.sha256.hexdigest(), size))

    def _sync_and_close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the last shard and write the manifest, which makes the data set complete."""
        if self._tar is not None:
            self._end_shard()
        labels = {
            "num_classes": len(self._class_names),
            "class_names": self._class_names,
            "class_counts": self._class_counts,
        }
        manifest = self._head | {"count": self.count, "labels": labels, "shards": [asdict(s) for s in self._shards]}
        with open(self._mark, "w", encoding="utf-8") as self._file:
            json.dump(manifest, self._file, indent=1)
            self._sync_and_close()
        os.replace(self._mark, self.folder / MANIFEST)

    def abort(self) -> None:
        """Remove everything this writer wrote."""
        if self._tar is not None:
            with contextlib.suppress(OSError), self._file:  # a full disk fails here once more
                self._tar.close()
        self._remove_shards()
        self._mark.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def check_target(folder: Path, *, force: bool) -> None:
    """Raise `UserError` where packing into `folder` would overwrite a complete data set, or files that are not ours."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the shards")
    if (folder / MANIFEST).exists():
        if not force:
            raise UserError(f"{folder} already holds a complete data set: choose another folder, or give --force")
    elif not (folder / (MANIFEST + ".part")).exists() and folder.is_dir():
        foreign = sorted(file.name for file in folder.iterdir() if _OURS.fullmatch(file.name))
        if foreign:
            raise UserError(f"{folder} holds {foreign[0]} that hsrgan did not pack: choose another folder")
