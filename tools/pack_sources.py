"""Where images to pack come from: a folder, a zip or an LMDB, listed in little memory and read by many processes.

What is kept of an image is its name (UTF-8) and 8 bytes, for a label 4 more and for a file in a zip 24 more; while a
source is being listed, each name also is a string of Python's.
"""

from __future__ import annotations

import functools
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import lmdb
import numpy as np

from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import Label
from hsrgan.tools.pack_images import Unusable
from hsrgan.tools.pack_labels import CHUNK, read_labels

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_ENTRY = np.dtype([("at", "<u8"), ("size", "<u8"), ("crc", "<u4"), ("method", "<u2"), ("flags", "<u2")])
_STORED, _DEFLATED, _ENCRYPTED, _UTF8 = 0, 8, 1, 1 << 11


class Names:
    """Many strings in a row of bytes."""

    def __init__(self, names: Sequence[str]):
        self.ends = np.zeros(len(names) + 1, np.uint64)
        text = bytearray()
        for i, name in enumerate(names):
            text += name.encode("utf-8", "surrogateescape")
            self.ends[i + 1] = len(text)
        self.text = bytes(text)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> str:
        return self.text[int(self.ends[i]) : int(self.ends[i + 1])].decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Source:
    """Images by name, in a fixed order. labels: int32, a class for each, or its place in `label_sets` where images may
    have several, or None. entries: where they are in a zip."""

    kind: str
    path: Path
    names: Names
    labels: np.ndarray | None = None
    class_names: Sequence[str] = ()
    entries: np.ndarray | None = None
    label_sets: Sequence[Label] | None = None

    def labels_of(self, rows: np.ndarray) -> list[int] | list[Label] | None:
        """As `ShardFile.add` takes them."""
        if self.labels is None or self.label_sets is None:
            return None if self.labels is None else self.labels[rows].tolist()
        return [self.label_sets[i] for i in self.labels[rows].tolist()]


@functools.cache
def reader(kind: str, path: str) -> Callable[[str, np.void | None], bytes]:
    """Reads an image by its name and entry. One for each process, and not from before a fork."""
    if kind == "folder":
        return lambda name, entry: Path(path, name).read_bytes()
    if kind == "zip":
        archive = open(path, "rb")  # noqa: SIM115  (for as long as the process lives)
        return lambda name, entry: _read_entry(archive, entry)
    base = _open_base(Path(path))

    def read(key: str, entry: object) -> bytes:
        with base.begin() as transaction:
            return transaction.get(key.encode("utf-8", "surrogateescape"))

    return read


def open_source(path: Path, *, labels: bool | None, resolution: int) -> Source:
    """Recognise what `path` is and list its images. labels: True demands them, False ignores them, None finds them."""
    if (path / "data.mdb").is_file() or path.suffix in (".mdb", ".lmdb"):
        return _open_lmdb(path, labels, resolution)
    if path.is_dir():
        found = [
            Path(base, file).relative_to(path).as_posix()
            for base, _, files in os.walk(path, followlinks=True)
            for file in files
            if _is_image(file) or (file == "dataset.json" and Path(base) == path)
        ]
        listed = "dataset.json" in found
        names = sorted(name for name in found if _is_image(name))
        del found
        table = functools.partial(_chunks_of_file, path / "dataset.json") if listed else None
        return _labelled(Source("folder", path, Names(names)), names, labels, table, by_folder=labels is not False)
    if not path.exists():
        raise UserError(f"there is no {path}: name a folder, a zip or an LMDB of images")
    return _open_zip(path, labels)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not any(part[0] in "._" for part in name.split("/") if part)


def _open_zip(path: Path, labels: bool | None) -> Source:
    names, entries, table = [], bytearray(), None
    with open(path, "rb") as archive:
        try:
            for name, entry in _directory(archive):
                if _is_image(name):
                    names.append(name)
                    entries += entry
                elif name == "dataset.json":
                    table = entry
        except (struct.error, UnicodeDecodeError):
            raise UserError(f"{path} is no folder, no zip and no LMDB: name one of those") from None
    rows = np.frombuffer(entries, _ENTRY)
    order = sorted(range(len(names)), key=names.__getitem__)  # stable: of two files of one name the last is meant
    order = [i for at, i in enumerate(order) if at + 1 == len(order) or names[order[at + 1]] != names[i]]
    names = [names[i] for i in order]
    source = Source("zip", path, Names(names), entries=rows[order])
    table = table and functools.partial(_chunks_of_entry, path, np.frombuffer(table, _ENTRY)[0])
    # Zips made by NVIDIA's tool have sub-folders that mean nothing, so here they are classes only on demand.
    return _labelled(source, names, labels, table, by_folder=labels is True)


def _directory(archive: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """(name, _ENTRY) of every file of a zip, zip64 included. `zipfile` keeps some 700 bytes for each.

    Source: PKWARE's APPNOTE 6.3.10, sections 4.3.12 to 4.3.16 and 4.5.3.
    """
    end = archive.seek(0, os.SEEK_END)
    tail_at = max(0, end - 65_557)
    archive.seek(tail_at)
    tail = archive.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise struct.error("no zip")
    _, _, _, _, count, size, offset, _ = struct.unpack_from("<4s4H2LH", tail, at)
    stop = tail_at + at
    if tail[max(at - 20, 0) : at][:4] == b"PK\6\7":
        (where,) = struct.unpack_from("<Q", tail, at - 20 + 8)
        archive.seek(where)
        fields = struct.unpack("<4sQ2H2L4Q", archive.read(56))
        count, size, offset, stop = fields[7], fields[8], fields[9], where
    shift = stop - size - offset  # of a zip behind something else
    archive.seek(stop - size)
    for _ in range(count):
        head = struct.unpack("<4s6H3L5H2L", archive.read(46))
        if head[0] != b"PK\1\2":
            raise struct.error("no zip directory")
        flags, method, crc, packed, whole, name, extra, comment, at = (head[i] for i in (3, 4, 7, 8, 9, 10, 11, 12, 16))
        text = archive.read(name).decode("utf-8" if flags & _UTF8 else "cp437")
        more = archive.read(extra)
        archive.read(comment)
        packed, at = _zip64(more, whole, packed, at)
        yield text, struct.pack("<2QI2H", at + shift, packed, crc, method, flags)


def _zip64(extra: bytes, whole: int, packed: int, at: int) -> tuple[int, int]:
    """(compressed size, offset), from the extra field where they do not fit 32 bits."""
    big, place = 0xFFFFFFFF, 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            values = list(struct.unpack_from(f"<{length // 8}Q", extra, place + 4))
            if whole == big:
                values.pop(0)
            packed = values.pop(0) if packed == big else packed
            at = values.pop(0) if at == big else at
        place += 4 + length
    return packed, at


def _data_of_entry(archive: BinaryIO, entry: np.void) -> int:
    """Where the compressed bytes begin."""
    if entry["flags"] & _ENCRYPTED or entry["method"] not in (_STORED, _DEFLATED):
        raise Unusable("encrypted, or compressed by other means than deflate")
    name, extra = struct.unpack_from("<2H", os.pread(archive.fileno(), 30, int(entry["at"])), 26)
    return int(entry["at"]) + 30 + name + extra


def _read_entry(archive: BinaryIO, entry: np.void) -> bytes:
    data = os.pread(archive.fileno(), int(entry["size"]), _data_of_entry(archive, entry))
    try:
        data = zlib.decompress(data, -15) if entry["method"] == _DEFLATED else data
    except zlib.error as error:
        raise Unusable(f"its compressed bytes are damaged ({error})") from None
    if zlib.crc32(data) != entry["crc"]:
        raise Unusable("its checksum in the zip is another")
    return data


def _chunks_of_file(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _chunks_of_entry(path: Path, entry: np.void) -> Iterator[bytes]:
    """As `_read_entry`, a little at a time."""
    with open(path, "rb") as archive:
        at, left, crc = _data_of_entry(archive, entry), int(entry["size"]), 0
        archive.seek(at)
        inflate = zlib.decompressobj(-15) if entry["method"] == _DEFLATED else None
        while left and (chunk := archive.read(min(left, CHUNK))):
            left -= len(chunk)
            try:
                chunk = inflate.decompress(chunk) if inflate else chunk
            except zlib.error as error:
                raise Unusable(f"its compressed bytes are damaged ({error})") from None
            crc = zlib.crc32(chunk, crc)
            yield chunk
        if crc != entry["crc"]:
            raise Unusable("its checksum in the zip is another")


def _labelled(
    source: Source, names: list[str], labels: bool | None, table: Callable[[], Iterator[bytes]] | None, *,
    by_folder: bool,
) -> Source:
    path = source.path
    if not names:
        raise UserError(f"{path} holds no images ({' '.join(SUFFIXES)}): name the folder or zip that does")
    if labels is not False and table is not None:
        try:
            found = read_labels(path, table(), names)
        except Unusable as error:
            raise UserError(f"dataset.json in {path} cannot be read ({error}): zip it again") from None
        if found is not None:
            numbers, sets, count = found
            return replace(source, labels=numbers, class_names=[str(i) for i in range(count)], label_sets=sets)
    if by_folder and all("/" in name for name in names):
        tops = sorted({name.split("/")[0] for name in names})
        if len(tops) >= 2:
            numbers = {top: i for i, top in enumerate(tops)}
            classes = np.fromiter((numbers[name.split("/")[0]] for name in names), np.int32, len(names))
            return replace(source, labels=classes, class_names=tops)
    if labels:
        raise UserError(
            f"{path} has no labels: they come from a dataset.json in it, or from at least two sub-folders that hold "
            "all the images; leave out --labels to pack without"
        )
    return source


def _open_base(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)


def _open_lmdb(path: Path, labels: bool | None, resolution: int) -> Source:
    """Every value an image; or, with keys like `256-00000`, those of the resolution asked for, else of the largest."""
    if labels:
        raise UserError(f"{path} is an LMDB, which has no labels: leave out --labels")
    try:
        with _open_base(path) as base, base.begin() as transaction, transaction.cursor() as cursor:
            keys = [key.decode("utf-8", "surrogateescape") for key in cursor.iternext(values=False) if key != b"length"]
    except lmdb.Error as error:
        raise UserError(f"cannot open the LMDB {path} ({error})") from None
    sizes = {int(match[1]) if (match := re.fullmatch(r"(\d+)-\d+", key)) else 0 for key in keys}
    if sizes and 0 not in sizes:
        size = resolution if resolution in sizes else max(sizes)
        keys = [key for key in keys if int(key.split("-")[0]) == size]
    if not keys:
        raise UserError(f"the LMDB {path} is empty")
    return Source("lmdb", path, Names(keys))
