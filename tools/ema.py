"""Averages of any length from those that a run with `ema.power` has kept.

    python tools/ema.py runs/ffhq --length 0.08 --at 25000 --out snapshot.safetensors
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import track
from torch import Tensor

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid, save_png
from hsrgan.engine.power_ema import LONGEST, Fit, fit
from hsrgan.engine.sampler import check_psi, generate, parse_seeds, place
from hsrgan.engine.snapshot import load_snapshot, read_metadata, read_tensors, save_snapshot
from hsrgan.tools import options

WORST = 0.1  # residual above which a length is refused
TITLE, GAP = 14, 8  # pixels, of the line above a grid and between two grids

app = CommandLine()


class Stored(NamedTuple):
    """One average that a run has kept."""

    path: Path
    metadata: dict

    @property
    def length(self) -> float:
        return self.metadata["power"]["length"]

    @property
    def images(self) -> int:
        return self.metadata["power"]["images"]

    @property
    def origin(self) -> dict[str, object]:
        """What is the same in every snapshot of a run."""
        recipe = self.metadata["recipe"]
        return {"generator": self.metadata["generator"], "dataset": self.metadata["dataset"].get("sha256"),
                "seed": recipe.get("seed"), "init_from": recipe.get("init_from")}  # fmt: skip


def stored_averages(run: Path) -> list[Stored]:
    """Those in the run's folder `power`, oldest first. Raises UserError where there are fewer than two, or not of one
    run.
    """
    folder = run / "power"
    found = [Stored(path, read_metadata(path)) for path in sorted(folder.glob("*.safetensors"))]
    if len(found) < 2:
        raise UserError(f"{folder} holds {len(found)} averages, two are the least: train with ema.power=[0.05,0.10]; "
                        "they are kept every snapshot_kimg")  # fmt: skip
    for one in found:
        if "power" not in one.metadata:
            raise UserError(f"{one.path} is no power-function average: only a run itself writes to this folder")
        if one.origin != found[0].origin:
            what = next(key for key, value in one.origin.items() if value != found[0].origin[key])
            raise UserError(f"{one.path} and {found[0].path} are of different runs (their {what} differs): keep those "
                            "of one run in the folder")  # fmt: skip
    return sorted(found, key=lambda one: (one.images, one.length))


def until(found: list[Stored], kimg: float | None) -> list[Stored]:
    """The averages up to `kimg`, at which there must be one; None: all."""
    if kimg is None:
        return found
    if not math.isfinite(kimg):
        raise UserError(f"--at {kimg:g}: give a number of kimg")
    moments = sorted({one.images for one in found})
    if round(kimg * 1000) not in moments:
        near = sorted(sorted(moments, key=lambda images: abs(images - kimg * 1000))[:3])
        raise UserError(f"--at {kimg:g}: averages were kept at {', '.join(f'{images / 1000:g}' for images in near)} … "
                        "kimg; give one of these moments")  # fmt: skip
    return [one for one in found if one.images <= round(kimg * 1000)]


def fit_lengths(used: list[Stored], wanted: Sequence[float]) -> list[Fit]:
    """For each length. Raises UserError for one that these averages cannot make."""
    times, kept, at = [one.images for one in used], [one.length for one in used], used[-1].images
    fits = []
    for length in wanted:
        if not 0 < length <= LONGEST:
            raise UserError(f"--length {length:g}: allowed are lengths above 0 and up to {LONGEST:.4f}, the plain mean")
        found = fit(times, kept, at, length)
        if found.residual > WORST:
            others = sorted({*kept, *np.arange(5, 289, 5) / 1000})
            good = [x for x in others if fit(times, kept, at, x).residual <= WORST]
            raise UserError(f"--length {length:g}: its profile would be off by {found.residual:.0%}; these {len(used)} "
                            f"averages make {good[0]:g} to {good[-1]:g} within {WORST:.0%}")  # fmt: skip
        fits.append(found)
    return fits


def combine(used: list[Stored], fits: list[Fit]) -> list[dict[str, Tensor]]:
    """The parameters of each fit: fp64 sums over the files, each of which is read once."""
    totals: list[dict[str, Tensor]] = [{} for _ in fits]
    console = Console(stderr=True)
    numbers = range(len(used))
    for i in track(numbers, description="averages", console=console, transient=True, disable=not console.is_terminal):
        for key, value in read_tensors(used[i].path).items():
            for total, one in zip(totals, fits, strict=True):
                part = value.double() * float(one.weights[i])
                total[key] = total[key] + part if i else part
    return totals


def reconstructed(nearest: Stored, parameters: dict[str, Tensor]) -> Generator:
    """The newest stored G with these parameters; its buffers, w_avg among them, stay."""
    generator, _ = load_snapshot(nearest.path)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.copy_(parameters[name])
    return generator


def side_by_side(pictures: dict[str, Image.Image]) -> Image.Image:
    """In a row, each below its title."""
    width = sum(picture.width for picture in pictures.values()) + GAP * (len(pictures) - 1)
    height = max(picture.height for picture in pictures.values())
    canvas = Image.new("RGB", (width, height + TITLE), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for title, picture in pictures.items():
        draw.text((left + 2, 1), title, fill="black")
        canvas.paste(picture, (left, TITLE))
        left += picture.width + GAP
    return canvas


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="A run_dir that was trained with ema.power.")],
    length: Annotated[list[float], typer.Option(help="σ_rel of the average to make, such as 0.08; repeatable.")],
    out: Annotated[Path, typer.Option(help="The snapshot; of several lengths, each gets its own after this name.")],
    at: Annotated[float | None, typer.Option(help="kimg at which it ends, one of those kept; by default the last.")] = (
        None
    ),
    seeds: Annotated[str, typer.Option(help="Of the pictures, a grid for each length in one .png beside --out.")] = (
        "0-15"
    ),
    psi: Annotated[float, typer.Option(help="Truncation of the pictures.")] = 1.0,
) -> None:
    """Make averages of G of any length after training: snapshots for sample.py and eval.py, and a picture of them all.

    One line of JSON a length; residual: how far its profile is from the wanted one, 0 = not at all.

    Example:

      python tools/ema.py runs/ffhq --length 0.03 --length 0.08 --length 0.15 --out averages/ffhq.safetensors
    """
    chosen = parse_seeds(seeds)
    check_psi(psi)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name must end in .safetensors; a .png is written beside it")
    if len(set(length)) < len(length):
        raise UserError(f"--length {max(length, key=length.count):g} is given twice; name each once")
    paths = [out if len(length) == 1 else out.with_name(f"{out.stem}-{one:g}{out.suffix}") for one in length]
    for path in paths:
        if path.parent.resolve() in ((run / "snapshots").resolve(), (run / "power").resolve()):  # the run's own
            options.spare_snapshot(path)
    used = until(stored_averages(run), at)
    fits = fit_lengths(used, length)
    options.make_folder(out)
    newest, pictures = used[-1], {}
    for path, one_length, one, parameters in zip(paths, length, fits, combine(used, fits), strict=True):
        generator, kimg = reconstructed(newest, parameters), newest.images / 1000
        facts = {"length": one_length, "images": newest.images, "residual": one.residual, "averages": len(used)}
        save_snapshot(
            path, generator, recipe_json=json.dumps(newest.metadata["recipe"], sort_keys=True), kimg=kimg,
            dataset=newest.metadata["dataset"], power=facts,
        )  # fmt: skip
        typer.echo(json.dumps({**facts, "kimg": kimg, "snapshot": str(path)}))
        with contextlib.redirect_stdout(sys.stderr):  # its progress
            images = generate(place(generator), chosen, psi=psi, noise_mode="const")
        pictures[f"{one_length:g}"] = image_grid(images)
    save_png(side_by_side(pictures), out.with_suffix(".png"))


if __name__ == "__main__":
    app()
