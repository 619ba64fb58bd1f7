"""Writing a packed data set (`shards` says what it holds), so that it is complete or is seen not to be.

A shard is written as `.part` and renamed when it is whole. `manifest.json.part` exists from the first byte of packing
and becomes `manifest.json` as the last step.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import Label, LabelSets, counts_of, to_text
from hsrgan.engine.shards import FORMAT, MANIFEST, MULTI_LABEL_FORMAT, Shard
from hsrgan.engine.sizes import plain

_OURS = re.compile(r"\d{5,}\.(tar|npy|cls\.npy)(\.part)?|manifest\.json(\.part)?")


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


class ShardFile:
    """One shard being written: `<number>.tar.part` until `end` makes it whole, its offsets beside it."""

    def __init__(self, folder: Path, number: int, image_format: str):
        self._base, self._image_format = folder / f"{number:05d}", image_format
        self._file = open(f"{self._base}.tar.part", "wb")  # noqa: SIM115  (closed in end, or by drop)
        self._sink = _Hashing(self._file)
        self._tar = tarfile.open(fileobj=self._sink, mode="w|", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._offsets = [0]
        self._labels: list[int | Label | None] = []

    @property
    def count(self) -> int:
        return len(self._offsets) - 1

    def add(self, key: str, image: bytes, label: int | Label | None) -> None:
        if isinstance(label, int):
            self._member(f"{key}.cls", str(label).encode())
        elif label is not None:
            self._member(f"{key}.json", json.dumps({"labels": label}).encode())
        self._member(f"{key}.{self._image_format}", image)
        self._labels.append(label)
        self._offsets.append(self._tar.offset)

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # mtime 0, an int: a float one would cost a PAX header a file
        member.size, member.mode, member.uname, member.gname = len(data), 0o444, "bigdata", "bigdata"
        self._tar.addfile(member, io.BytesIO(data))

    def end(self) -> Shard:
        self._tar.close()
        size = self._file.tell()
        _sync_and_close(self._file)
        self._save(".npy", np.array(self._offsets, np.uint64))
        if all(isinstance(label, int) for label in self._labels):
            self._save(".cls.npy", np.array(self._labels, np.int32))
        os.replace(f"{self._base}.tar.part", f"{self._base}.tar")
        return Shard(f"{self._base.name}.tar", self.count, self._sink.sha256.hexdigest(), size)

    def _save(self, suffix: str, array: np.ndarray) -> None:
        with open(f"{self._base}{suffix}.part", "wb") as file:
            np.save(file, array)
        os.replace(f"{self._base}{suffix}.part", f"{self._base}{suffix}")

    def drop(self) -> None:
        with contextlib.suppress(OSError), self._file:  # a full disk fails here once more
            self._tar.close()
        Path(f"{self._base}.tar.part").unlink(missing_ok=True)


def _sync_and_close(file: IO) -> None:
    with file:
        file.flush()
        os.fsync(file.fileno())


class ShardWriter:
    """Write encoded images as shards, in the order given, and the manifest at the end. A context manager.

    resolution   (height, width) of every image; channels 1, 3 or 4. Both are recorded, not checked.
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
        self._labels: Counter[Label] = Counter()
        self._facts = {"resolution": resolution, "channels": channels, "image_format": image_format}
        self._facts |= {"quality": quality, "source": source}
        self._class_names = list(class_names)
        self._shards: list[Shard] = []
        self.count = 0
        self._shard: ShardFile | None = None
        check_target(self.folder, force=force)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark = self.folder / (MANIFEST + ".part")
        if (self.folder / MANIFEST).exists():
            os.replace(self.folder / MANIFEST, self._mark)
        self._mark.touch()
        remove_shards(self.folder)

    def add(self, image: bytes, label: int | Label | None = None) -> None:
        """Append one encoded image, with its class when the data set has classes, or its classes: all as one."""
        if (label is not None) != bool(self._class_names):
            raise ValueError("a data set has a label for every image or for none")
        if self._shard is None:
            self._shard = ShardFile(self.folder, len(self._shards), self.image_format)
        self._shard.add(f"{self.count:08d}", image, label)
        if label is not None:
            self._labels[(label,) if isinstance(label, int) else label] += 1
        self.count += 1
        if self._shard.count == self.shard_size:
            self._end_shard()

    def _end_shard(self) -> None:
        self._shards.append(self._shard.end())
        self._shard = None

    def close(self) -> None:
        """End the last shard and write the manifest, which makes the data set complete."""
        if self._shard is not None:
            self._end_shard()
        write_manifest(self.folder, self._shards, self._class_names, self._labels, **self._facts)

    def abort(self) -> None:
        """Remove everything this writer wrote."""
        if self._shard is not None:
            self._shard.drop()
        remove_shards(self.folder)
        self._mark.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def remove_shards(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove every shard and sidecar, whole or not, but those named in `keep`."""
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and not file.name.startswith(MANIFEST) and file.name not in keep:
            file.unlink()


def write_manifest(
    folder: Path,
    shards: Sequence[Shard],
    class_names: Sequence[str],
    labels: Mapping[Label, int],
    *,
    resolution: tuple[int, int],
    channels: int,
    image_format: str,
    quality: int | None,
    source: str,
) -> None:
    """The last step of packing: manifest.json appears and manifest.json.part goes. Arguments as `ShardWriter`'s;
    labels: how many images have each."""
    counts = counts_of(labels, len(class_names))
    multi_label = isinstance(counts, LabelSets)
    manifest = {
        "format": MULTI_LABEL_FORMAT if multi_label else FORMAT,
        "source": source,
        "resolution": plain(resolution),
        "channels": channels,
        "encoding": {"format": image_format, "quality": quality},
        "count": sum(shard.count for shard in shards),
        "labels": {
            "num_classes": len(class_names),
            "class_names": list(class_names),
            "class_counts": list(counts.class_counts if multi_label else counts),
            **({"sets": {to_text(label): count for label, count in sorted(labels.items())}} if multi_label else {}),
        },
        "shards": [asdict(shard) for shard in shards],
    }
    mark = folder / (MANIFEST + ".part")
    with open(mark, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        _sync_and_close(file)
    os.replace(mark, folder / MANIFEST)


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
