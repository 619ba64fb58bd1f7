"""Pictures from a snapshot: `python tools/sample.py SNAPSHOT --seeds 0-63 --out DIR`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from hsrgan.engine.aside import check_writable
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.edits import Edits, parse_layers, read_edits
from hsrgan.engine.errors import UserError
from hsrgan.engine.latents import Latents, save_latents
from hsrgan.engine.metrics.report import Bars
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid, save_png
from hsrgan.engine.sampler import (
    BATCH,
    Noise,
    check_psi,
    images_of,
    layer_noise,
    parse_seeds,
    place,
    told,
    truncated,
)
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools import options
from hsrgan.tools.options import Start

STRENGTHS = 7  # rows of an edit's range

app = CommandLine()


@dataclass(frozen=True)
class Grid:
    """Pictures to make: names, ws [N, num_ws, w_dim], and for the noise the seed, or the number of the file's row, of
    each. rows: what they are called. corner: the first tile is left free.
    """

    names: list[str]
    ws: Tensor
    origins: list[int]
    rows: list[str]
    corner: bool = False


def parse_psis(text: str) -> list[float]:
    try:
        psis = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--psi {text}: give a number, or several with commas between: a row for each") from None
    for psi in psis:
        check_psi(psi)
    return psis


def sweep(
    columns: Start,
    generator: Generator,
    labels: list[tuple[str, Tensor | None]],
    psis: list[float],
    cutoff: int | None,
    edits: Edits,
    batch: int,
) -> Grid:
    """A row for each class, each ψ or each strength of a range, whichever there are several of."""
    strengths = [0.0]
    if edits.step is not None:  # + 0.0: the middle of -2:2 is no -0.00
        strengths = [round(s, 6) + 0.0 for s in torch.linspace(edits.low, edits.high, STRENGTHS).tolist()]
    rows, ws = [], []
    for words, c in labels:
        start = columns.ws(generator, c, batch)
        for psi in psis:
            base = truncated(generator, start, psi, cutoff)
            for strength in strengths:
                file_name = edits.name.replace("/", "_")
                edit = f"{file_name}{strength:+.2f}" if edits.step is not None else ""
                rows.append("-".join(filter(None, [words, f"psi{psi:g}" if len(psis) > 1 else "", edit])))
                ws.append(base + edits.at(strength))
    names = ["-".join(filter(None, [name, row])) for row in rows for name in columns.names]
    return Grid(names, torch.cat(ws), columns.seeds * len(rows), rows)


def mixing(
    columns: Start,
    seeds: list[int],
    layers: tuple[int, int],
    generator: Generator,
    c: Tensor | None,
    psi: float,
    cutoff: int | None,
    edit: Tensor,
    batch: int,
) -> Grid:
    """StyleGAN's mixing: a row for each of `seeds`, whose pictures take their `layers` from the column's source. Above
    them the columns' own pictures, before each row its own.
    """
    sources = Start([f"seed{seed:04d}" for seed in seeds], seeds)
    above, left = (truncated(generator, of.ws(generator, c, batch), psi, cutoff) for of in (columns, sources))
    names, ws, origins = list(columns.names), [above], list(columns.seeds)
    for name, row, seed in zip(sources.names, left, seeds, strict=True):
        mixed = row.repeat(len(above), 1, 1)
        mixed[:, layers[0] : layers[1] + 1] = above[:, layers[0] : layers[1] + 1]
        ws += [row[None], mixed]
        names += [name, *(f"{name}-mix-{column}" for column in columns.names)]
        origins += [seed] * (1 + len(above))
    return Grid(names, torch.cat(ws) + edit, origins, ["sources of the columns", *sources.names], corner=True)


def _one_kind_of_rows(several: dict[str, bool]) -> None:
    """Raise `UserError` where the grid would need a third dimension."""
    asked = [name for name, is_asked in several.items() if is_asked]
    if len(asked) > 1:
        raise UserError(f"{' with '.join(asked)}: a grid has rows of one kind; make one grid for each")


@app.command()
def main(
    snapshot: options.SnapshotFile,
    seeds: Annotated[str | None, options.seeds_option("0-63")] = None,
    w: options.LatentsFile = None,
    psi: Annotated[str, typer.Option(help="Truncation: 1 = none, 0 = the average picture. 0.3,0.7,1: a row each.")] = (
        "1"
    ),
    cutoff: options.Cutoff = None,
    label: Annotated[
        str | None,
        typer.Option(help="A class by number or name (several with commas for a multi-label model), or 'all': a row "
                     "for each class. By default each seed draws its class."),
    ] = None,
    noise: options.NoiseMode = Noise.const,
    edit: options.Edit = None,
    directions: options.DirectionsFiles = None,
    mix: Annotated[
        str | None,
        typer.Option(help="Style mixing: seeds of the rows, whose pictures take --mix-layers from the column's seed."),
    ] = None,
    mix_layers: Annotated[
        str | None, typer.Option(help="The ws taken from the columns, such as 0-6; by default the coarser half.")
    ] = None,
    save_w: Annotated[
        Path | None, typer.Option(help="Write the ws of all pictures, as made, to this .safetensors or .npz.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures; made if absent.")] = Path("samples"),
    batch: options.Batch = BATCH,
    grid: Annotated[bool, typer.Option(help="Write all of them as grid.png.")] = True,
    single: Annotated[bool, typer.Option(help="Write each as seed0000.png (seed0000-class3.png with --label).")] = True,
) -> None:
    """Make pictures from a snapshot alone.

    Examples:

      python tools/sample.py runs/quickstart/snapshots/000160000.safetensors --seeds 0-63

      python tools/sample.py model.safetensors --seeds 0-9 --label all --psi 0.7 --no-single --out digits

      python tools/sample.py model.safetensors --seeds 0-7 --psi 0,0.25,0.5,0.75,1

      python tools/sample.py model.safetensors --seeds 55,821,1789 --mix 85,100,75 --mix-layers 0-6

      python tools/sample.py model.safetensors --directions directions.safetensors --edit smile=-3:3 --edit hat=-1

      python tools/sample.py model.safetensors --w projected.safetensors --directions d.safetensors --edit smile=2
    """
    with Bars() as bars:
        if not grid and not single:
            raise UserError("--no-grid with --no-single leaves nothing to write; drop one of them")
        if save_w:
            options.spare_snapshot(save_w, "--save-w")
        generator, metadata = load_snapshot(snapshot)
        columns = options.read_start(seeds, w, label, generator, default="0-63")
        psis = parse_psis(psi)
        options.check_cutoff(cutoff, generator, snapshot)
        labels = options.read_label(label, generator, snapshot, metadata["dataset"])
        edits = read_edits(edit or [], directions or [], generator, snapshot)
        if mix_layers is not None and mix is None:
            raise UserError(f"--mix-layers {mix_layers} needs --mix: the seeds of the rows")
        _one_kind_of_rows({
            "several --psi": len(psis) > 1, "--label all": len(labels) > 1, "--mix": mix is not None,
            f"--edit {edits.name}={edits.low:g}:{edits.high:g}": edits.step is not None,
        })  # fmt: skip
        coarse = f"0-{generator.num_ws // 2 - 1}"
        layers = parse_layers(coarse if mix_layers is None else mix_layers, generator.num_ws, "--mix-layers")
        rows = [] if mix is None else parse_seeds(mix, "--mix")

        generator = place(generator)
        if rows:
            plan = mixing(columns, rows, layers, generator, labels[0][1], psis[0], cutoff, edits.fixed, batch)
        else:
            plan = sweep(columns, generator, labels, psis, cutoff, edits, batch)
        stored = columns.file.noise if columns.file and noise is Noise.const else None
        if stored is not None and rows:
            stored = None
            typer.echo(f"the noise in {w} is left out: a mixed picture has two sources")
        if save_w:
            kept = None if stored is None else stored[plan.origins]
            space = "w" if torch.equal(plan.ws, plan.ws[:, :1].expand_as(plan.ws)) else "w+"
            save_latents(save_w, Latents(plan.ws, kept, sha256_of(snapshot), space))
        check_writable(out, "name another --out")
        rows_of_noise = None
        if stored is not None:
            rows_of_noise = lambda at: stored[[plan.origins[i] for i in at]]  # noqa: E731
        elif noise is Noise.random:
            rows_of_noise = lambda at: layer_noise([plan.origins[i] for i in at], generator)  # noqa: E731
        made = images_of(generator, plan.ws, noise_mode=noise.value, noise=rows_of_noise, batch=batch)
        images = torch.cat(list(told(made, bars, "sampling", len(plan.ws))))

        if single:
            for name, image in zip(plan.names, images, strict=True):
                save_png(image_grid(image[None], scale=1), out / f"{name}.png")
        if grid:
            tiles = torch.cat([torch.zeros_like(images[:1]), images]) if plan.corner else images
            cols = len(columns.names) + plan.corner if len(plan.rows) > 1 else None
            save_png(image_grid(tiles, cols=cols), out / "grid.png")
        typer.echo(f"{len(images)} pictures of {snapshot} ({metadata['kimg']:g} kimg) in {out}")
        if len(plan.rows) > 1:
            names = metadata["dataset"].get("class_names") if len(labels) > 1 else None
            typer.echo(f"rows of the grid: {', '.join(names or plan.rows)}")


if __name__ == "__main__":
    app()
