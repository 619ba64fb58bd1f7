"""Pictures from a snapshot: `python tools/sample.py SNAPSHOT --seeds 0-63 --out DIR`."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hsrgan.engine.aside import writable
from hsrgan.engine.errors import UserError, user_errors
from hsrgan.engine.labels import Label, multi_hot, parse_label
from hsrgan.engine.metrics.directions import load_directions
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid, save_png, to_uint8
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of

MAX_SEED = 2**32 - 1  # of NumPy's RandomState

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Noise(str, enum.Enum):
    """What is added in every synthesis layer."""

    random = "random"
    const = "const"
    none = "none"


def parse_seeds(text: str) -> list[int]:
    """`0-3,10` → [0, 1, 2, 3, 10]. Raises `UserError` for anything else, and for seeds beyond 2³² − 1."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--seeds {text}: {part.strip()!r} is not a number or a range; write it like 0-63,100")
        low, high = int(first), int(last or first)
        if not low <= high <= MAX_SEED:
            raise UserError(f"--seeds {text}: {part.strip()} must rise, and end at {MAX_SEED} or before")
        seeds.extend(range(low, high + 1))
    return seeds


def draw(seeds: Sequence[int], generator: Generator) -> tuple[Tensor, Tensor]:
    """z [N, z_dim] fp32 and a class for each [N] int64 (0 where the model has none), a function of the seed alone.

    z is NVIDIA's: RandomState(seed).randn(1, z_dim). The class is uniform, the next draw of the same stream.
    """
    streams = [np.random.RandomState(seed) for seed in seeds]
    z = np.concatenate([stream.randn(1, generator.z_dim) for stream in streams])
    classes = [stream.randint(max(generator.c_dim, 1)) for stream in streams]
    return torch.from_numpy(z).float(), torch.tensor(classes)


def layer_noise(seeds: Sequence[int], generator: Generator) -> Tensor:
    """[N, noise_size] fp32, a function of the seed alone: a sample does not depend on the others in its batch."""
    size = generator.synthesis.noise_size
    return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def generate(
    generator: Generator,
    seeds: Sequence[int],
    classes: Tensor | None = None,
    *,
    psi: float = 1.0,
    cutoff: int | None = None,
    noise_mode: str = "random",
    shift: Tensor | None = None,
    batch: int = 16,
) -> Tensor:
    """The images of `seeds`, uint8 [N, C, H, W] on the CPU, made `batch` at a time where the generator lives.

    classes: [N] int64, or labels [N, c_dim]; by default a class is drawn from each seed. shift [w_dim] is added to
    every w, after truncation. Shows progress.
    """
    device = next(generator.parameters()).device
    images = []
    rate = TextColumn("{task.fields[rate]:.1f} img/s")
    columns = [TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()]
    with Progress(*columns) as progress:
        task = progress.add_task("sampling", total=len(seeds), rate=0.0)
        began = time.perf_counter()
        for start in range(0, len(seeds), batch):
            part = seeds[start : start + batch]
            z, drawn = draw(part, generator)
            chosen = drawn if classes is None else classes[start : start + batch]
            if generator.c_dim and chosen.ndim == 1:
                chosen = torch.nn.functional.one_hot(chosen, generator.c_dim).float()
            c = chosen.to(device) if generator.c_dim else None
            noise = layer_noise(part, generator).to(device) if noise_mode == "random" else None
            ws = generator.mapping(z.to(device), c, truncation_psi=psi, truncation_cutoff=cutoff)
            if shift is not None:
                ws = ws + shift.to(ws)
            image = generator.synthesis(ws, noise_mode=noise_mode, noise=noise)
            images.append(to_uint8(image).cpu())
            done = start + len(part)
            progress.update(task, completed=done, rate=done / (time.perf_counter() - began))
    return torch.cat(images)


def place(generator: Generator) -> Generator:
    """On the GPU where there is one, else on the CPU."""
    return generator.to("cuda" if torch.cuda.is_available() else "cpu")


def _rows_of_labels(label: str | None, generator: Generator, snapshot: Path, dataset: dict) -> list[Label | None]:
    """The label of each row of the grid; one None where seeds choose their own class or the model has none."""
    if label is None:
        return [None]
    if not generator.c_dim:
        raise UserError(f"--label {label}: {snapshot} was trained without labels; leave --label out")
    if label == "all":
        return [(i,) for i in range(generator.c_dim)]
    return [
        parse_label(
            label, generator.c_dim, dataset.get("class_names", ()), several=dataset.get("multi_label", False),
            where=f"--label {label}: {snapshot}",
        )
    ]  # fmt: skip


def edit_shift(edits: Sequence[str], file: Path | None, generator: Generator, snapshot: Path) -> Tensor | None:
    """What `--edit name=strength …` adds to w [w_dim], from the directions in `file`; None without edits."""
    if not edits:
        if file is not None:
            raise UserError(f"--directions {file} without --edit changes nothing: add --edit name=2, or leave it out")
        return None
    if file is None:
        raise UserError(f"--edit {edits[0]} needs --directions FILE: make it with tools/fit_directions.py")
    directions = load_directions(file)
    directions.expect(w_dim=generator.w_dim, snapshot=sha256_of(snapshot), path=file)
    total = torch.zeros(generator.w_dim)
    for edit in edits:
        name, _, strength = edit.rpartition("=")
        try:
            value = float(strength)
        except ValueError:
            value = math.nan
        if not name or not math.isfinite(value):
            raise UserError(f"--edit {edit}: write it like smile=2 or smile=-1.5, in standard deviations of w")
        total += directions.shift(name, value)
    return total


@app.command()
def main(
    snapshot: Annotated[Path, typer.Argument(help="A .safetensors file from a run's snapshots folder.")],
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0-63,100. One seed is one picture, always the same.")] = (
        "0-63"
    ),
    psi: Annotated[float, typer.Option(help="Truncation: 1 = none, 0 = the average picture.")] = 1.0,
    cutoff: Annotated[int | None, typer.Option(min=1, help="Truncate only this many ws, the coarsest.")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="A class by number or name (several with commas for a multi-label model), or 'all': a row "
                          "for each class. By default each seed draws its class."),
    ] = None,
    noise: Annotated[Noise, typer.Option(help="Layer noise: drawn from the seed, the stored constant, or none.")] = (
        Noise.const
    ),
    edit: Annotated[
        list[str] | None,
        typer.Option(help="name=strength, repeatable: change an attribute by so many standard deviations of w."),
    ] = None,
    directions: Annotated[
        Path | None, typer.Option(help="The directions of --edit, made by tools/fit_directions.py.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pictures; made if absent.")] = Path("samples"),
    batch: Annotated[int, typer.Option(min=1, help="Images made at a time.")] = 16,
    grid: Annotated[bool, typer.Option(help="Write all of them as grid.png.")] = True,
    single: Annotated[bool, typer.Option(help="Write each as seed0000.png (seed0000-class3.png with --label).")] = True,
) -> None:
    """Make pictures from a snapshot alone.

    Examples:

      python tools/sample.py runs/quickstart/snapshots/000160000.safetensors --seeds 0-63

      python tools/sample.py model.safetensors --seeds 0-9 --label all --psi 0.7 --no-single --out digits

      python tools/sample.py model.safetensors --directions directions.safetensors --edit smile=2 --edit hat=-1
    """
    with user_errors():
        if not grid and not single:
            raise UserError("--no-grid with --no-single leaves nothing to write; drop one of them")
        chosen_seeds = parse_seeds(seeds)
        generator, metadata = load_snapshot(snapshot)
        if cutoff is not None and cutoff > generator.num_ws:
            raise UserError(f"--cutoff {cutoff}: {snapshot} has {generator.num_ws} ws; give 1 to {generator.num_ws}")
        rows = _rows_of_labels(label, generator, snapshot, metadata["dataset"])
        shift = edit_shift(edit or [], directions, generator, snapshot)
        with writable(out, "name another --out"):
            out.mkdir(parents=True, exist_ok=True)

        every_seed = [seed for _ in rows for seed in chosen_seeds]
        labels = None
        if rows != [None]:
            labels = torch.from_numpy(multi_hot(rows, generator.c_dim)).repeat_interleave(len(chosen_seeds), 0)
        images = generate(
            place(generator), every_seed, labels, psi=psi, cutoff=cutoff, noise_mode=noise.value, shift=shift,
            batch=batch,
        )  # fmt: skip
        if single:
            for i, (seed, image) in enumerate(zip(every_seed, images, strict=True)):
                suffix = "" if labels is None else f"-class{'+'.join(map(str, rows[i // len(chosen_seeds)]))}"
                save_png(image_grid(image[None], scale=1), out / f"seed{seed:04d}{suffix}.png")
        if grid:
            save_png(image_grid(images, cols=len(chosen_seeds) if len(rows) > 1 else None), out / "grid.png")
        typer.echo(f"{len(images)} pictures of {snapshot} ({metadata['kimg']:g} kimg) in {out}")
        names = metadata["dataset"].get("class_names")
        if len(rows) > 1 and names:
            typer.echo(f"rows of the grid: {', '.join(names)}")


if __name__ == "__main__":
    app()
