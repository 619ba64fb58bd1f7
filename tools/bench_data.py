"""Time the loader beside plain webdataset and torchvision's ImageFolder, on the same encoded images.

    python tools/bench_data.py                          32², 256² and 1024² PNG, no worker and two
    python tools/bench_data.py --format jpg --workers 8 --json benchmarks/data_cpu.json

Images are made like photographs (a 1/f spectrum), written as files and as shards with the same bytes. Before anything
is timed, all three must have given the same pixels, each image once an epoch. They take turns, so that what else the
machine does falls on all of them; after a turn's first batches, which were decoded ahead, each is read for a while.
A cell of the table (a resolution with a number of workers) has a budget of time; the whole takes about three minutes.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import webdataset as wds
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from torch.utils.data import DataLoader

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.data import open_stream
from hsrgan.engine.errors import UserError
from hsrgan.engine.samples import PIL_FORMATS
from hsrgan.engine.shard_writer import ShardWriter
from hsrgan.engine.shards import Manifest, load_manifest
from hsrgan.tools.bench_kernels import now, versions

COUNTS = {32: 4096, 64: 2048, 128: 1024, 256: 512, 512: 128, 1024: 64}  # images of each resolution
BATCH_PIXELS = 2**20  # at most: a larger batch of large images would leave few in an epoch, and the others pause there
SHARDS = 16


class Format(str, enum.Enum):
    png = "png"
    jpg = "jpg"


@dataclass(frozen=True)
class Files:
    """The same encoded images twice: `root/<class>/<number>.<format>`, and packed."""

    root: Path
    manifest: Manifest


def photograph(side: int, rng: np.random.Generator) -> Image.Image:
    """RGB noise of equal power in every octave, as natural images have about; half of it common to the channels."""
    total = np.zeros((3, 1, 1), np.float32)
    for octave in range(1, side.bit_length()):
        size = 2**octave
        large = [Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC) for plane in total]
        noise = rng.standard_normal((4, size, size), np.float32)
        total = np.stack([np.asarray(plane) for plane in large]) + (noise[:3] + noise[3]) * 0.75 ** max(octave - 4, 0)
    return Image.fromarray(np.clip(128 + 22 * total, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def make(folder: Path, side: int, count: int, image_format: str) -> Files:
    rng = np.random.default_rng(side)
    writer = ShardWriter(
        folder / "shards", resolution=(side, side), channels=3, image_format=image_format, class_names=["0", "1"],
        shard_size=-(-count // SHARDS),
    )  # fmt: skip
    for label in "01":
        (folder / "files" / label).mkdir(parents=True)
    with writer:
        for i in track(range(count), f"making {side}²", console=Console(stderr=True), transient=True):
            out = io.BytesIO()
            photograph(side, rng).save(out, PIL_FORMATS[image_format], quality=95)
            (folder / "files" / str(i % 2) / f"{i:06d}.{image_format}").write_bytes(out.getvalue())
            writer.add(out.getvalue(), i % 2)
    return Files(folder / "files", load_manifest(folder / "shards"))


def ours(files: Files, batch: int, workers: int) -> Iterator[torch.Tensor]:
    return (images for images, _ in open_stream(files.manifest, seed=0, start=0, global_batch=batch, workers=workers))


def _stack(samples: list[tuple[Image.Image, int]]) -> tuple[torch.Tensor, list[int]]:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in samples]))
    return pixels.permute(0, 3, 1, 2), [label for _, label in samples]


def _for_ever(loader: DataLoader) -> Iterator[torch.Tensor]:
    while True:
        yield from (images for images, _ in loader)


def plain_webdataset(files: Files, batch: int, workers: int) -> Iterator[torch.Tensor]:
    """As its documentation has it: shards shuffled, a buffer of a thousand samples, decoded by PIL."""
    urls = [files.manifest.location(shard) for shard in files.manifest.shards]
    dataset = wds.WebDataset(urls, shardshuffle=100, empty_check=False).shuffle(1000).decode("pil")
    dataset = dataset.to_tuple(files.manifest.image_format, "cls").batched(batch, collation_fn=_stack, partial=True)
    return _for_ever(DataLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=workers > 0))


def image_folder(files: Files, batch: int, workers: int) -> Iterator[torch.Tensor]:
    from torchvision.datasets import ImageFolder

    return _for_ever(DataLoader(
        ImageFolder(str(files.root)), batch, shuffle=True, num_workers=workers, collate_fn=_stack,
        persistent_workers=workers > 0,
    ))  # fmt: skip


LOADERS: dict[str, Callable[[Files, int, int], Iterator[torch.Tensor]]] = {
    "hsrgan": ours, "webdataset": plain_webdataset, "ImageFolder": image_folder,
}  # fmt: skip


def epoch_digest(stream: Iterator[torch.Tensor], count: int) -> str:
    """Of the pixels of the first `count` images, in whatever order."""
    digests = []
    while len(digests) < count:
        digests += [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in next(stream)]
    if len(digests) != count:
        raise UserError(f"an epoch gave {len(digests)} images, there are {count}")
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def check_equal(files: Files, batch: int) -> None:
    """Raise `UserError` unless one epoch of every loader has the same pixels."""
    digests = {name: epoch_digest(loader(files, batch, 0), files.manifest.count) for name, loader in LOADERS.items()}
    if len(set(digests.values())) > 1:
        raise UserError(f"the loaders do not give the same pixels, so nothing is timed: {digests}")


def timed(stream: Iterator[torch.Tensor], ahead: int, seconds: float) -> float:
    """Images a second, after `ahead` batches that may have been waiting."""
    for _ in range(ahead):
        next(stream)
    images, began = 0, time.perf_counter()
    while (now := time.perf_counter() - began) < seconds:
        images += len(next(stream))
    return images / now


def bench(
    files: Files, batch: int, workers: int, seconds: float, turns: int, told: Callable[[str], None]
) -> list[dict]:
    """In about `seconds`, of which half goes by between a turn's begin and its first batch that counts; fewer turns
    where more does. told: of each turn as it begins."""
    streams = {name: loader(files, batch, workers) for name, loader in LOADERS.items()}
    rates: dict[str, list[float]] = {name: [] for name in LOADERS}
    began = time.perf_counter()
    for turn in range(turns):
        if turn and (time.perf_counter() - began) * (turn + 1) / turn > seconds:
            break
        for name in list(streams)[:: 1 if turn % 2 else -1]:  # none is always first
            told(f"{name}, turn {turn + 1} of {turns}")
            rates[name].append(timed(streams[name], 3 * workers + 1, seconds / turns / len(streams) / 2))
    for stream in streams.values():
        stream.close()
    faster = max(statistics.median(rates[name]) for name in LOADERS if name != "hsrgan")
    manifest = files.manifest
    return [
        {"loader": name, "resolution": manifest.resolution[0], "format": manifest.image_format, "workers": workers,
         "batch": batch, "images": manifest.count, "img_s": statistics.median(values), "turns": values,
         "ratio_to_faster": statistics.median(values) / faster}
        for name, values in rates.items()
    ]  # fmt: skip


def print_rows(rows: list[dict], console: Console) -> None:
    title = "decoded images a second, median of turns (lowest–highest); ratio to the faster of the other two"
    table = Table(title=title)
    for heading in ("resolution", "format", "workers", *LOADERS, "ratio"):
        table.add_column(heading, justify="right")
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["resolution"], row["format"], row["workers"]), {})[row["loader"]] = row
    for (side, image_format, workers), by_name in groups.items():
        cells = [f"{r['img_s']:.0f} ({min(r['turns']):.0f}–{max(r['turns']):.0f})" for r in by_name.values()]
        table.add_row(f"{side}²", image_format, str(workers), *cells, f"{by_name['hsrgan']['ratio_to_faster']:.2f}")
    console.print(table)


def _tell(progress: Progress, task: TaskID, where: str, what: str) -> None:
    progress.update(task, advance=1, description=where + what)


app = CommandLine()


def _numbers(text: str, option: str, known: Callable[[int], bool]) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and known(int(part)) for part in parts):
        sides = ", ".join(map(str, COUNTS))
        raise UserError(f"{option} {text}: give whole numbers with commas between; resolutions are {sides}")
    return [int(part) for part in parts]


@app.command()
def main(
    resolutions: Annotated[str, typer.Option(help="Sides of the images.")] = "32,256,1024",
    format: Annotated[Format, typer.Option(help="How they are encoded.")] = Format.png,
    workers: Annotated[str, typer.Option(help="Loader processes, a run for each number.")] = "0,2",
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch at most; fewer of large images.")] = 32,
    images: Annotated[int | None, typer.Option(min=1, help="Of each size; by default less the larger.")] = None,
    seconds: Annotated[float, typer.Option(min=0.05, help="For a resolution with a number of workers.")] = 15.0,
    turns: Annotated[int, typer.Option(min=1, help="Of each loader, as far as the seconds reach.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there too.")] = None,
) -> None:
    """Images a second of the loader beside plain webdataset and ImageFolder, on the same files.

    Example:

      python tools/bench_data.py --resolutions 32,256 --workers 0,2 --json loader.json
    """
    console, rows = Console(width=max(Console().width, 118)), []  # the table's; a pipe has 80
    sides = _numbers(resolutions, "--resolutions", COUNTS.__contains__)
    counts = _numbers(workers, "--workers", lambda n: True)
    facts = {"cpus": len(os.sched_getaffinity(0)), "versions": versions(), "date": now()}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    for side in sides:
        with tempfile.TemporaryDirectory(prefix="bench_data-") as folder:
            files = make(Path(folder), side, images or COUNTS[side], format.value)
            size = min(batch, files.manifest.count, max(2, BATCH_PIXELS // side**2))
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task(f"{side}²: comparing pixels", total=len(counts) * len(LOADERS) * turns)
                check_equal(files, size)
                for i, number in enumerate(counts):
                    progress.update(task, completed=i * len(LOADERS) * turns)
                    told = functools.partial(_tell, progress, task, f"{side}², {number} workers: ")
                    rows += [row | facts for row in bench(files, size, number, seconds, turns, told)]
    print_rows(rows, console)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
