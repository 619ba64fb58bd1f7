"""Find the directions in a model's W along which attributes change, for `tools/sample.py --edit`.

    python tools/fit_directions.py SNAPSHOT --attributes attributes.safetensors --out directions.safetensors

See `engine/metrics/directions.py` for how, and for the unit of an edit.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hsrgan.engine.distributed import World
from hsrgan.engine.errors import UserError, user_errors
from hsrgan.engine.metrics.attributes import load_attributes
from hsrgan.engine.metrics.directions import FEWEST, SHARE, Directions, fit_directions, save_directions
from hsrgan.engine.metrics.sequences import random_samples
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools.sample import place

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.1f}/s")


def _report(directions: Directions) -> Table:
    table = Table(title=f"directions from {directions.samples} samples")
    for heading in ("attribute", "held-out accuracy", "std of w along it"):
        table.add_column(heading, justify="left" if heading == "attribute" else "right")
    for name, accuracy, std in zip(directions.names, directions.accuracy, directions.std, strict=True):
        table.add_row(name, f"{accuracy:.3f}", f"{std:.3f}")
    return table


@app.command()
def main(
    snapshot: Annotated[Path, typer.Argument(help="A .safetensors file from a run's snapshots folder.")],
    attributes: Annotated[Path, typer.Option(help="Attribute classifier, from tools/fit_attributes.py.")],
    out: Annotated[Path, typer.Option(help="The directions file to write.")] = Path("directions.safetensors"),
    name: Annotated[
        list[str] | None, typer.Option(help="An attribute, repeatable; by default all that the classifier can tell.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=round(FEWEST / SHARE), help="Random images; InterFaceGAN takes 500000.")
    ] = 20000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    allow_weak: Annotated[
        bool, typer.Option("--allow-weak", help="Also attributes that the classifier tells poorly.")
    ] = False,
) -> None:
    """Fit a direction in W for each attribute of a classifier.

    Example:

      python tools/fit_directions.py runs/quickstart/snapshots/000160000.safetensors --attributes attributes.safetensors
    """
    with user_errors():
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another")
        generator, _ = load_snapshot(snapshot)
        classifier = load_attributes(attributes).restricted(name, allow_weak=allow_weak)
        generator = place(generator)
        device = next(generator.parameters()).device
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()]
        with Progress(*columns) as progress:
            task = progress.add_task("sampling", total=samples)
            found = random_samples(
                generator, classifier.to(device), count=samples, seed=seed, world=World(0, 1, 0, 1, device),
                class_counts=[1] * generator.c_dim,  # as tools/sample.py draws them
                told=lambda images: progress.update(task, advance=images),
            )  # fmt: skip
            task = progress.add_task("fitting", total=len(classifier.names))
            directions = fit_directions(
                found.w.numpy(), found.logits.numpy(), classifier.names, seed=seed, snapshot=sha256_of(snapshot),
                progress=lambda done: progress.update(task, advance=done),
            )  # fmt: skip
        command = shlex.join(["python", "tools/fit_directions.py", *sys.argv[1:]])
        save_directions(out, directions, command=command)
        Console().print(_report(directions))
        typer.echo(f"{out}: use it with tools/sample.py {snapshot} --directions {out} --edit {directions.names[0]}=2")


if __name__ == "__main__":
    app()
