"""Pack a folder, a zip or an LMDB of images into WebDataset shards with a manifest, for training and evaluation."""

from __future__ import annotations

import collections
import contextlib
import enum
import io
import itertools
import json
import os
import re
import signal
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import lmdb
import numpy as np
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from hsrgan.engine.errors import UserError, user_errors
from hsrgan.engine.shards import ShardWriter, check_target, folder_lock

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Crop(str, enum.Enum):
    none = "none"
    center = "center"
    skip = "skip"


class Filter(str, enum.Enum):
    lanczos = "lanczos"
    bicubic = "bicubic"
    bilinear = "bilinear"
    box = "box"


class Format(str, enum.Enum):
    png = "png"
    jpg = "jpg"
    webp = "webp"


class Unusable(Exception):
    """An image to leave out; the message is the reason."""


@dataclass(frozen=True)
class Source:
    """Images by name, in a fixed order. `read` is called from several threads; `labels` has a class for every name."""

    names: Sequence[str]
    read: Callable[[str], bytes]
    labels: dict[str, int] | None = None
    class_names: Sequence[str] = ()


def open_source(path: Path, *, labels: bool | None, resolution: int) -> Source:
    """Recognise what `path` is and list its images. labels: True demands them, False ignores them, None finds them."""
    if (path / "data.mdb").is_file() or path.suffix in (".mdb", ".lmdb"):
        return _open_lmdb(path, labels, resolution)
    if path.is_dir():
        found = (
            (Path(base, file).relative_to(path).as_posix())
            for base, _, files in os.walk(path, followlinks=True)
            for file in files
        )
        return _open_files(path, labels, found, lambda name: (path / name).read_bytes(), by_folder=labels is not False)
    if not path.exists():
        raise UserError(f"there is no {path}: name a folder, a zip or an LMDB of images")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no folder, no zip and no LMDB: name one of those")
    archive = zipfile.ZipFile(path)
    # Zips made by NVIDIA's tool have sub-folders that mean nothing, so here they are classes only on demand.
    return _open_files(path, labels, archive.namelist(), archive.read, by_folder=labels is True)


def _open_files(
    path: Path, labels: bool | None, found: Iterable[str], read: Callable[[str], bytes], *, by_folder: bool
) -> Source:
    everything = set(found)
    names = sorted(
        name
        for name in everything
        if name.lower().endswith(SUFFIXES) and not any(part[0] in "._" for part in name.split("/") if part)
    )
    if not names:
        raise UserError(f"{path} holds no images ({' '.join(SUFFIXES)}): name the folder or zip that does")
    if labels is not False and "dataset.json" in everything:
        classes = _classes_of_json(path, read("dataset.json"), names)
        if classes:
            count = max(classes.values()) + 1
            return Source(names, read, classes, [str(i) for i in range(count)])
    if by_folder:
        tops = sorted({name.split("/")[0] for name in names if "/" in name})
        if len(tops) >= 2 and all("/" in name for name in names):
            return Source(names, read, {name: tops.index(name.split("/")[0]) for name in names}, tops)
    if labels:
        raise UserError(
            f"{path} has no labels: they come from a dataset.json in it, or from at least two sub-folders that hold "
            "all the images; leave out --labels to pack without"
        )
    return Source(names, read)


def _classes_of_json(path: Path, raw: bytes, names: Sequence[str]) -> dict[str, int] | None:
    """NVIDIA's {"labels": [["00000/img0.png", 3], …]}; None where it says that there are no labels."""
    try:
        pairs = json.loads(raw)["labels"]
        if not pairs:
            return None
        listed = {name.replace("\\", "/"): label for name, label in pairs}
    except (ValueError, TypeError, KeyError) as error:
        form = '{"labels": [["a.png", 3], …]}'
        raise UserError(f"dataset.json in {path} is not of the form {form} ({error!r}): mend or remove it") from None
    for name in names:
        label = listed.get(name)
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            fault = f"gives {name} the label {label!r}, no whole number" if name in listed else f"does not list {name}"
            raise UserError(f"dataset.json in {path} {fault}: mend it, or pack with --no-labels")
    return {name: listed[name] for name in names}


def _open_lmdb(path: Path, labels: bool | None, resolution: int) -> Source:
    """Every value an image; or, with keys like `256-00000`, those of the resolution asked for, else of the largest."""
    if labels:
        raise UserError(f"{path} is an LMDB, which has no labels: leave out --labels")
    try:
        base = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False)
        with base.begin() as transaction, transaction.cursor() as cursor:
            keys = [key.decode("utf-8", "surrogateescape") for key in cursor.iternext(values=False) if key != b"length"]
    except lmdb.Error as error:
        raise UserError(f"cannot open the LMDB {path} ({error})") from None
    sizes = {int(match[1]) if (match := re.fullmatch(r"(\d+)-\d+", key)) else 0 for key in keys}
    if sizes and 0 not in sizes:
        size = resolution if resolution in sizes else max(sizes)
        keys = [key for key in keys if int(key.split("-")[0]) == size]
    if not keys:
        raise UserError(f"the LMDB {path} is empty")

    def read(key: str) -> bytes:
        with base.begin() as transaction:
            return transaction.get(key.encode("utf-8", "surrogateescape"))

    return Source(keys, read)


@dataclass(frozen=True)
class Recipe:
    """How one image becomes one sample."""

    resolution: int
    crop: Crop
    resize: Filter
    channels: int
    format: Format
    quality: int | None

    def apply(self, name: str, data: bytes) -> tuple[bytes, bool]:
        """Encoded source image -> (encoded sample, whether it had to be enlarged).

        Raises `Unusable` for an image to leave out, `UserError` for one that needs a decision.
        """
        try:
            image = Image.open(io.BytesIO(data))
            image.load()
            image = _to_mode(ImageOps.exif_transpose(image), "RGB" if self.channels == 3 else "L")
        except Unusable:
            raise
        except Exception as error:  # a damaged file makes PIL raise nearly anything
            reason = "no known image format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            raise Unusable(reason) from None
        width, height = image.size
        if width != height and self.crop is Crop.none:
            raise UserError(
                f"{name} is {width}x{height}, not square: give --crop center to cut squares from the middle, "
                "or --crop skip to leave such images out"
            )
        if width != height and self.crop is Crop.skip:
            raise Unusable(f"{width}x{height} is not square")
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != self.resolution:
            image = image.resize((self.resolution, self.resolution), Image.Resampling[self.resize.name.upper()])
        return self._encode(image), side < self.resolution

    def _encode(self, image: Image.Image) -> bytes:
        out = io.BytesIO()
        if self.format is Format.png:
            image.save(out, "png", compress_level=3)  # half the time of the default 6, 4 % larger
        elif self.format is Format.jpg:
            image.save(out, "jpeg", quality=self.quality, subsampling=0)  # a generator would learn halved chroma
        else:
            image.save(out, "webp", quality=self.quality)
        return out.getvalue()


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """8-bit RGB or L: 16-bit values are divided by 256, transparent pixels lie over white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    if image.mode == "F":
        raise Unusable("floating-point pixels")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


Sample = tuple[str, bytes | Unusable, bool]  # name, encoded image or why not, whether enlarged


def prepare(source: Source, order: Iterable[str], recipe: Recipe) -> Iterator[Sample]:
    """Samples in the order given, read and encoded by a thread a core (Pillow lets go of the interpreter's lock)."""

    def one(name: str) -> Sample:
        try:
            return name, *recipe.apply(name, source.read(name))
        except UserError:
            raise
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return name, Unusable(reason), False

    threads = len(os.sched_getaffinity(0))
    names = iter(order)
    pool = ThreadPoolExecutor(threads)
    try:
        waiting = collections.deque(pool.submit(one, name) for name in itertools.islice(names, 4 * threads))
        while waiting:
            sample = waiting.popleft().result()
            waiting.extend(pool.submit(one, name) for name in itertools.islice(names, 1))
            yield sample
    finally:
        pool.shutdown(cancel_futures=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} img/s")


def write(source: Source, writer: ShardWriter, recipe: Recipe, *, seed: int, limit: int, console: Console) -> None:
    """Write `source` in a random order fixed by `seed`, at most `limit` images, with progress and a closing line."""
    # Streaming shuffles only within a window of shards; this is what makes that enough.
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(source.names))
    skipped = enlarged = size = 0
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    names = (source.names[i] for i in order)
    with contextlib.closing(prepare(source, names, recipe)) as samples, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=min(limit, len(source.names)))
        for name, image, is_enlarged in samples:
            if isinstance(image, Unusable):
                skipped += 1
                console.print(f"skipped {name}: {image}", markup=False, highlight=False, soft_wrap=True)
            else:
                writer.add(image, source.labels[name] if source.labels else None)
                enlarged += is_enlarged
                size += len(image)
            progress.update(task, completed=writer.count if limit < len(source.names) else writer.count + skipped)
            if writer.count == limit:
                break
    if not writer.count:
        raise UserError(f"none of the {len(source.names)} images can be used")
    classes = f", {len(source.class_names)} classes" if source.labels else ""
    notes = f"; {skipped} skipped" if skipped else ""
    if enlarged:
        notes += f"; {enlarged} smaller than {recipe.resolution}x{recipe.resolution} and enlarged"
    console.print(
        f"{writer.count} images of {recipe.resolution}x{recipe.resolution}{classes}, {size / 1e6:.1f} MB, "
        f"in {writer.folder}{notes}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


app = typer.Typer(add_completion=False)


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder, zip or LMDB of images.", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="Folder for the shards; made if missing.", show_default=False)],
    resolution: Annotated[int, typer.Option(help="Side of the packed images, a power of two.", show_default=False)],
    crop: Annotated[
        Crop,
        typer.Option(help="For images that are not square: none stops there, center cuts, skip leaves out and lists."),
    ] = Crop.none,
    resize: Annotated[Filter, typer.Option(help="Filter for resizing.")] = Filter.lanczos,
    channels: Annotated[int, typer.Option(help="3 for colour, 1 for grey.")] = 3,
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--no-labels",
            help="Classes from a dataset.json in SOURCE, else from its sub-folders. By default used where found; "
            "sub-folders of a zip only with --labels.",
            show_default=False,
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How images are stored.")] = Format.png,
    quality: Annotated[
        int | None, typer.Option(help="Of jpg and webp, 1 to 100; 95 if not given.", show_default=False)
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the order that images are packed in.")] = 0,
    max_images: Annotated[
        int | None,
        typer.Option(min=1, help="Pack a random choice of so many.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a complete data set in DEST.")] = False,
) -> None:
    """Pack a folder, a zip or an LMDB of images into WebDataset shards with a manifest.

    Images that cannot be read are listed, left out and counted. If packing is interrupted, run the same command again.

    Examples:

      python tools/pack.py photos/ shards/photos --resolution 256 --crop center

      python tools/pack.py cifar10.zip shards/cifar10 --resolution 32

      python tools/pack.py church_outdoor_train_lmdb shards/church --resolution 256 --crop center --format webp
    """
    if resolution < 4 or resolution & (resolution - 1):
        raise UserError(f"--resolution {resolution}: a power of two from 4 on is needed")
    if channels not in (1, 3):
        raise UserError(f"--channels {channels}: 3 (colour) or 1 (grey)")
    if channels == 1 and format is Format.webp:
        raise UserError("--format webp has no grey images: choose png or jpg, or --channels 3")
    if quality is not None and (format is Format.png or not 1 <= quality <= 100):
        raise UserError(f"--quality {quality}: 1 to 100, and only with --format jpg or webp (png is lossless)")
    if format is not Format.png and quality is None:
        quality = 95
    check_target(dest, force=force)
    console = Console(stderr=True)
    recipe = Recipe(resolution, crop, resize, channels, format, quality)
    try:
        images = open_source(source, labels=labels, resolution=resolution)
        if dest.exists() and dest.samefile(source):
            raise UserError(f"{dest} is the source itself: give the shards a folder of their own")
        with folder_lock(dest, wait=False):
            writer = ShardWriter(
                dest,
                resolution=(resolution, resolution),
                channels=channels,
                image_format=format.value,
                quality=quality,
                class_names=images.class_names,
                shard_size=shard_size,
                source=source.resolve().name,
                force=force,
            )
            with writer:
                write(images, writer, recipe, seed=seed, limit=max_images or len(images.names), console=console)
    except OSError as error:
        raise UserError(f"{error.filename or dest}: {error.strerror}") from None
    except KeyboardInterrupt:
        console.print("interrupted: nothing was kept; the same command starts again")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it cleans up like Ctrl-C
    with user_errors():
        app()
