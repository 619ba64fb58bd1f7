"""Pack a folder, a zip or an LMDB of images into WebDataset shards with a manifest, for training and evaluation.

Memory: what `pack_sources` keeps of an image, and about 60 MB for this process and each that it starts.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import from_text
from hsrgan.engine.shard_writer import check_target, folder_lock, write_manifest
from hsrgan.engine.shards import load_manifest
from hsrgan.engine.sizes import block_sizes, in_words
from hsrgan.tools.pack_images import Crop, Filter, Format, Recipe
from hsrgan.tools.pack_shards import Packers, Record, jobs_of, pack_shard
from hsrgan.tools.pack_sources import Source, open_source
from hsrgan.tools.pack_verify import verify as verify_shards


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} img/s")


def _progress(what: str, console: Console) -> Progress:
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TextColumn("left"), TimeRemainingColumn()
    return Progress(*columns, console=console)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def write(
    source: Source, folder: Path, recipe: Recipe, packers: Packers, *, seed: int, limit: int, shard_size: int,
    console: Console,
) -> None:  # fmt: skip
    """Write `source` in a random order fixed by `seed`, with progress and a closing line; finished shards stay."""
    total, what = min(limit, len(source.names)), source.path.resolve().name
    options = asdict(recipe) | {"seed": seed, "limit": total, "shard_size": shard_size, "source": what}
    record = Record(folder, options | {"names": _digest(source)})
    try:
        if record.restarted:
            _say(console, f"starting over: what {folder} holds is of another packing")
        before = sum((done.shard.count if done.shard else 0) + len(done.skipped) for done in record.done.values())
        if before:
            _say(console, f"going on after {len(record.done)} finished shards")
        jobs = jobs_of(source, recipe, folder, seed=seed, limit=limit, shard_size=shard_size, finished={*record.done})
        with _progress("packing", console) as progress:
            task = progress.add_task("", total=total, completed=before)
            for done, images in packers.run(pack_shard, jobs):
                progress.update(task, completed=before + images)
                if done is not None:
                    record.add(done)
                    for name, reason in done.skipped:
                        _say(console, f"skipped {name}: {reason}")
        finished = [record.done[number] for number in sorted(record.done)]
        shards = [done.shard for done in finished if done.shard]
        if not shards:
            raise UserError(f"none of the {total} images can be used")
    finally:
        packers.close()  # first: none may still write
        record.close()
    labels = Counter()
    for done in finished:
        labels.update({from_text(text): count for text, count in done.classes.items()})
    write_manifest(
        folder, shards, source.class_names, labels, resolution=recipe.resolution,
        channels=recipe.channels, image_format=recipe.format.value, quality=recipe.quality, source=what,
    )  # fmt: skip
    skipped, enlarged = (sum(values) for values in zip(*((len(d.skipped), d.enlarged) for d in finished), strict=True))
    classes = f", {len(source.class_names)} classes" if source.class_names else ""
    if source.label_sets is not None:
        classes += f" in {len(labels)} sets (multi-label)"
    notes, side = f"; {skipped} skipped" if skipped else "", in_words(recipe.resolution)
    if enlarged:
        notes += f"; {enlarged} smaller than {side} and enlarged"
    count, size = sum(shard.count for shard in shards), sum(done.size for done in finished)
    _say(console, f"{count} images of {side}{classes}, {size / 1e6:.1f} MB, in {folder}{notes}")


def _digest(source: Source) -> str:
    """Of the names and classes: another source is another packing."""
    digest = hashlib.sha256(source.names.text)
    digest.update(source.names.ends.tobytes())
    digest.update(b"" if source.labels is None else np.ascontiguousarray(source.labels).tobytes())
    digest.update(b"" if source.label_sets is None else repr(source.label_sets).encode())
    return digest.hexdigest()


def check(folder: Path, processes: int, console: Console) -> None:
    """Read a packed data set again; `UserError` at the end where anything is wrong with it."""
    manifest = load_manifest(folder)
    with Packers(processes) as packers, _progress("checking", console) as progress:
        task = progress.add_task("", total=manifest.count)
        problems = verify_shards(
            manifest, packers, lambda line: _say(console, line), lambda n: progress.update(task, completed=n)
        )
    if problems:
        raise UserError(f"{folder} has {problems} problem{'s' * (problems > 1)}: copy it again, or pack it again")
    _say(console, f"{folder}: {len(manifest.shards)} shards, {manifest.count} images, all as the manifest says")


def _size(text: str) -> tuple[int, int]:
    """`256`, `512x768` or `512,768` → (height, width). Raises `UserError` unless networks make such images."""
    parts = text.replace("x", ",").split(",")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--resolution {text}: write the side, or height x width, as 256 or 512x768")
    size = int(parts[0]), int(parts[-1])
    block_sizes(size, "--resolution")
    return size


app = CommandLine(rich_markup_mode="rich")


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="Folder, zip or LMDB of images.", show_default=False)],
    dest: Annotated[
        Path | None, typer.Argument(help="Folder for the shards; made if missing.", show_default=False)
    ] = None,
    resolution: Annotated[
        str | None,
        typer.Option(help="Of the packed images: the side, or height x width as 512x768.", show_default=False),
    ] = None,
    crop: Annotated[
        Crop,
        typer.Option(help="For images of another shape: none stops there, center cuts, skip leaves out and lists."),
    ] = Crop.none,
    resize: Annotated[Filter, typer.Option(help="Filter for resizing.")] = Filter.lanczos,
    channels: Annotated[int, typer.Option(help="3 for colour, 1 for grey, 4 for colour and straight alpha.")] = 3,
    labels: Annotated[
        bool | None,
        typer.Option(
            "--labels/--no-labels",
            help="Classes from a dataset.json in SOURCE (a number for each image, a list of them or a 0/1 vector), "
            "else from its sub-folders. By default used where found; sub-folders of a zip only with --labels.",
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
        typer.Option(min=1, help="Of a random choice of so many; the unusable are left out.", show_default=False),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That pack; one a core if not given. The result is the same.",
                                 show_default=False)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="SOURCE is a packed data set: read all of it again and list what is wrong. "
                             "Adds the class indexes (*.cls.npy) that sets of older versions lack.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a complete data set in DEST.")] = False,
) -> None:
    """Pack a folder, a zip or an LMDB of images into WebDataset shards with a manifest.

    Images that cannot be read are listed, left out and counted. If packing is interrupted, the same command goes on
    after the shards that are finished (by the names of the images; changed contents are not noticed).

    Examples:

      python tools/pack.py photos/ shards/photos --resolution 256 --crop center

      python tools/pack.py cifar10.zip shards/cifar10 --resolution 32

      python tools/pack.py church_outdoor_train_lmdb shards/church --resolution 256 --crop center --format webp

      python tools/pack.py sprites/ shards/sprites --resolution 96x64 --channels 4

      python tools/pack.py shards/photos --verify
    """
    console = Console(stderr=True)
    processes = processes or len(os.sched_getaffinity(0))
    if verify:
        check(source, processes, console)
        return
    if dest is None or resolution is None:
        raise UserError("give SOURCE, DEST and --resolution, or SHARDS --verify; --help says more")
    size = _size(resolution)
    if channels not in (1, 3, 4):
        raise UserError(f"--channels {channels}: 3 (colour), 1 (grey) or 4 (colour and alpha)")
    if channels == 4 and format is Format.jpg:
        raise UserError("--format jpg has no alpha: choose png or webp, or --channels 3")
    if channels == 1 and format is Format.webp:
        raise UserError("--format webp has no grey images: choose png or jpg, or --channels 3")
    if quality is not None and (format is Format.png or not 1 <= quality <= 100):
        raise UserError(f"--quality {quality}: 1 to 100, and only with --format jpg or webp (png is lossless)")
    if format is not Format.png and quality is None:
        quality = 95
    check_target(dest, force=force)
    recipe, new = Recipe(size, crop, resize, channels, format, quality), not dest.exists()
    try:
        with Packers(processes) as packers:
            images = open_source(source, labels=labels, resolution=max(size))
            if dest.exists() and dest.samefile(source):
                raise UserError(f"{dest} is the source itself: give the shards a folder of their own")
            with folder_lock(dest, wait=False):
                check_target(dest, force=force)
                write(
                    images, dest, recipe, packers, seed=seed, limit=max_images or len(images.names),
                    shard_size=shard_size, console=console,
                )  # fmt: skip
    except UserError:
        if new and dest.is_dir() and os.listdir(dest) == [".lock"]:  # nothing came of it
            shutil.rmtree(dest)
        raise
    except OSError as error:
        raise UserError(f"{error.filename or dest}: {error.strerror}") from None
    except KeyboardInterrupt:
        console.print("interrupted: finished shards are kept, the same command goes on after them")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that it cleans up like Ctrl-C
    app()
