"""Real images into a snapshot's latent space: `python tools/project.py SNAPSHOT IMAGE … --out DIR`."""

from __future__ import annotations

import enum
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hsrgan.engine.aside import check_writable, writable
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import multi_hot, parse_label
from hsrgan.engine.latents import Latents, save_latents
from hsrgan.engine.likeness import likeness
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid, save_png
from hsrgan.engine.projection import Projection, Settings, project
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools.pack_images import Crop, Filter, Format, Recipe, Unusable

REMEDY = "free space there or name another --out"

app = CommandLine()


class Space(str, enum.Enum):
    """How many w's an image has."""

    w = "w"
    w_plus = "w+"


def read_image(path: Path, generator: Generator) -> Tensor:
    """[C, H, W] in [−1, 1], of the generator's shape and channels, as tools/pack.py --crop center makes samples."""
    channels, *size = generator.img_shape
    recipe = Recipe(tuple(size), Crop.center, Filter.lanczos, channels, Format.png, None)
    try:
        sample, _ = recipe.apply(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"image {path}: {error.strerror or error}; check its name") from None
    except Unusable as error:
        raise UserError(f"image {path} cannot be read ({error}): give a whole picture, such as a PNG or JPEG") from None
    pixels = np.array(Image.open(io.BytesIO(sample)))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1) / 127.5 - 1


def read_label(label: str, generator: Generator, snapshot: Path, dataset: dict) -> Tensor | None:
    """c [c_dim] of `--label`; None for all, which alone a model without labels takes."""
    if label == "all":
        return None
    where = f"--label {label}: {snapshot}"
    if not generator.c_dim:
        raise UserError(f"{where} was trained without labels; leave --label out")
    names, several = dataset.get("class_names", ()), dataset.get("multi_label", False)
    chosen = parse_label(label, generator.c_dim, names, several=several, where=where)
    return torch.from_numpy(multi_hot([chosen], generator.c_dim))[0]


def names_of(images: list[Path]) -> list[str]:
    """What the files of each image are called after. Raises `UserError` where two would be called alike."""
    names = [path.stem for path in images]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"{images[names.index(name)]} and {images[i]} would both be written as {name}-w.safetensors"
                            ": rename one, or project them one by one, each with an --out of its own")
    return names


def draw_convergence(facts: dict, path: Path) -> None:
    """The distance and the noise's regulariser of every step, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, sharex=True)
    titles = {"distance": f"distance by {Path(facts['likeness']).name}", "regulariser": "regulariser of the noise maps"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        axes.semilogy(facts[key], linewidth=1.2)
        axes.set_title(title, loc="left", fontsize="medium")
        axes.grid(alpha=0.3)
    panels[1].set_xlabel("step")
    figure.savefig(path, format="png")


def write_image(out: Path, name: str, target: Tensor, found: Projection, i: int, facts: dict) -> None:
    """The files of image i of a projection: all of them appear, or none."""
    latents = Latents(found.w[i : i + 1], found.noise[i : i + 1], facts["snapshot_sha256"], facts["space"])
    curves = {key: getattr(found, key)[:, i].tolist() for key in ("distance", "regulariser", "pixel")}
    facts = {**facts, **curves}
    pair = image_grid(torch.stack([target, found.image[i].cpu()]), cols=2)
    with writable(out, REMEDY), tempfile.TemporaryDirectory(dir=out, prefix=".project-") as folder:
        staged = Path(folder)
        save_png(pair, staged / f"{name}-side-by-side.png")
        draw_convergence(facts, staged / f"{name}-convergence.png")
        (staged / f"{name}-convergence.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        save_latents(staged / f"{name}-w.safetensors", latents)
        save_latents(staged / f"{name}-w.npz", latents)
        for file in sorted(staged.iterdir()):
            os.replace(file, out / file.name)


@app.command()
def main(
    snapshot: Annotated[Path, typer.Argument(help="A .safetensors file from a run's snapshots folder.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures of any size: cut to the model's shape and resized.")],
    space: Annotated[
        Space, typer.Option(help="w: one w an image, which edits best; w+: one for each layer, which fits best.")
    ] = Space.w,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam; StyleGAN2 takes 1000.")] = 1000,
    lr: Annotated[float, typer.Option(min=1e-6, help="Adam's highest rate.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed, the same latent.")] = 0,
    label: Annotated[
        str,
        typer.Option(help="The class to begin from, by number or name (several with commas for a multi-label model); "
                          "all: the mean of all."),
    ] = "all",
    features: Annotated[
        str | None,
        typer.Option("--features", "--teacher",
                     help="The network that likeness is to: vgg16 (imported by tools/import_weights.py), a teacher's "
                          ".safetensors, or timm:MODEL[:FILE]. By default the recipe's teacher, or vgg16 where it has "
                          "none."),
    ] = None,
    pixel: Annotated[float, typer.Option(min=0, help="Weight of the mean square of pixels beside it; of use "
                                          "for RGBA, which likeness sees over mid-grey alone.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, help="Images projected at a time.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the results; made if absent.")] = Path("projected"),
) -> None:
    """Find the latents whose pictures are most like real images.

    Each image NAME leaves NAME-w.safetensors (w and the layers' noise), NAME-w.npz (w alone, as NVIDIA's), a picture
    (left the image, right what was found), and the convergence as a plot and as JSON.

    Examples:

      python tools/project.py runs/mine/snapshots/best.safetensors face.jpg --out projected

      python tools/project.py ffhq.safetensors faces/*.png --space w+ --features vgg16 --steps 500

      python tools/sample.py ffhq.safetensors --w projected/face-w.safetensors --directions d.safetensors --edit smile=2
    """
    names = names_of(images)
    generator, metadata = load_snapshot(snapshot)
    targets = torch.stack([read_image(path, generator) for path in images])
    c = read_label(label, generator, snapshot, metadata["dataset"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge = likeness(features, metadata["recipe"], snapshot).to(device)
    check_writable(out, REMEDY)
    settings = Settings(space.value, steps, lr, seed, pixel)
    facts = {
        "snapshot": str(snapshot), "snapshot_sha256": sha256_of(snapshot), "likeness": judge.name,
        "space": space.value, "steps": steps, "lr": lr, "seed": seed, "label": label, "weight_of_pixel": pixel,
    }  # fmt: skip
    generator = generator.to(device)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[distance]}")]
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("projecting", total=steps * -(-len(images) // batch), rate="", distance="")
        for start in range(0, len(images), batch):

            def told(step: int, distance: float, before: int = start // batch * steps) -> None:
                speed = progress.tasks[task].speed
                rate = f"{speed:.1f} steps/s" if speed else ""
                progress.update(task, completed=before + step, rate=rate, distance=f"distance {distance:.4f}")

            part = slice(start, start + batch)
            found = project(generator, targets[part].to(device), judge, settings, label=c, told=told)
            for i, (path, name) in enumerate(zip(images[part], names[part], strict=True)):
                write_image(out, name, targets[start + i], found, i, {"image": str(path), **facts})
                first, last = found.distance[0, i], found.distance[-1, i]
                console.print(f"{path}: distance {first:.4f} → {last:.4f}", markup=False, soft_wrap=True)
    typer.echo(f"{len(images)} images projected by {judge.name}: {out}")


if __name__ == "__main__":
    app()
