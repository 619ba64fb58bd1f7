"""A packed data set: numbered WebDataset shards, sidecars for each, and a manifest.

    photos/
      00000.tar      tar of `<number>.png` (or jpg, webp) and, where there are labels, `<number>.cls`, or
                     `<number>.json` where an image may have several
      00000.npy      uint64 [count + 1]: byte offset of each sample's tar fragment, and the end of the last one
      00000.cls.npy  int32 [count], where every image has one class: that class. Older sets lack it, and
                     `tools/pack.py --verify` adds it
      …
      manifest.json

A shard is written as `.part` and renamed when it is whole. `manifest.json.part` exists from the first byte of packing
and becomes `manifest.json` as the last step, so a folder with a `manifest.json` is complete and anything else is not.
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
import urllib.parse
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import numpy as np

from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import ClassCounts, Label, LabelSets, counts_of, from_text, to_text
from hsrgan.engine.sizes import Resolution, in_words, plain, sides

if TYPE_CHECKING:
    from hsrgan.engine.shard_cache import ShardCache

FORMAT, MULTI_LABEL_FORMAT = "hsrgan-shards-1", "hsrgan-shards-2"
MANIFEST = "manifest.json"
IMAGE_FORMATS = ("png", "jpg", "webp")
_OURS = re.compile(r"\d{5,}\.(tar|npy|cls\.npy)(\.part)?|manifest\.json(\.part)?")


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
    file = path / MANIFEST if path.is_dir() else path
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
