"""Find directions in W to edit along: SeFa, PCA, or SVMs of attributes.

    python tools/directions.py sefa SNAPSHOT        # from the weights alone
    python tools/directions.py pca SNAPSHOT         # from random w
    python tools/directions.py svm SNAPSHOT --attributes attributes.safetensors
    python tools/directions.py name FILE pca0=pose  # once the contact sheet has shown what they do

Each writes a file of directions, for --edit of tools/sample.py and tools/video.py, and beside it a contact sheet of
all of them (.png) and their figures (.json).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from hsrgan.engine import factorised
from hsrgan.engine.aside import written_aside
from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.direction_sheet import STRENGTHS, contact_sheet
from hsrgan.engine.distributed import World
from hsrgan.engine.edits import parse_layers
from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics.attributes import load_attributes, nearest
from hsrgan.engine.metrics.directions import (
    FEWEST,
    MEASURES,
    SHARE,
    Directions,
    fit_directions,
    load_directions,
    save_directions,
)
from hsrgan.engine.metrics.report import Bars
from hsrgan.engine.metrics.sequences import random_samples
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import save_png
from hsrgan.engine.sampler import (
    BATCH,
    MAX_SEED,
    check_memory,
    check_psi,
    parse_seeds,
    place,
    truncated,
    ws_of_seeds,
)
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools import options

app = CommandLine(no_args_is_help=True)

Out = Annotated[
    Path, typer.Option(help="The directions file to write, its folder made if absent; .png and .json go beside it.")
]
Count = Annotated[int, typer.Option(min=1, help="How many directions, the strongest first.")]
LayerRange = Annotated[str | None, typer.Option(help="The ws they move, such as 0-6; by default all.")]
RandomW = Annotated[int, typer.Option(min=100, help="Random w: PCA's data, and the deviation along each direction.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the random w.")]
Seeds = Annotated[str, typer.Option(help="The samples on the contact sheet.")]
DEFAULT = Path("directions.safetensors")


class _Counter:
    """Bars that are told what is new."""

    def __init__(self, bars: Bars, text: str, total: int) -> None:
        self._bars, self._text, self._total, self._done = bars, text, total, 0
        bars(text, 0, total)

    def __call__(self, new: int) -> None:
        self._done += new
        self._bars(self._text, self._done, self._total)


@app.callback()
def _main() -> None:
    """Find directions in a model's W to edit along.

    Examples:

      python tools/directions.py sefa runs/quickstart/snapshots/000160000.safetensors --layers 0-2 --count 5

      python tools/directions.py svm model.safetensors --attributes attributes.safetensors --out smile.safetensors
    """


FACTORISED = {
    "sefa": """From the weights alone (SeFa): what changes the styles of the chosen layers most.

    Examples:

      python tools/directions.py sefa model.safetensors --count 10

      python tools/directions.py sefa model.safetensors --layers 0-3 --out pose.safetensors
    """,
    "pca": """Principal components of W (GANSpace).

    Examples:

      python tools/directions.py pca model.safetensors --count 20 --samples 50000

      python tools/directions.py pca model.safetensors --layers 8-17 --out colours.safetensors
    """,
}


def _factorised(kind: str) -> Callable[..., None]:
    def command(
        snapshot: options.SnapshotFile,
        count: Count = 10,
        layers: LayerRange = None,
        samples: RandomW = 10000,
        seed: Seed = 0,
        seeds: Seeds = "0-2",
        psi: options.Psi = 0.7,
        out: Out = DEFAULT,
        batch: options.Batch = BATCH,
    ) -> None:
        with Bars() as bars:
            _check_out(out)
            check_psi(psi)
            shown = parse_seeds(seeds)
            generator, _ = load_snapshot(snapshot)
            chosen = None if layers is None else parse_layers(layers, generator.num_ws, "--layers")
            factorised.check_count(count, samples, generator)
            check_memory(samples, 2 * 8 * generator.w_dim)  # fp64, and once more while it is put together
            generator = place(generator)
            w = factorised.random_w(generator, samples, seed, batch=1024, told=_Counter(bars, "random w", samples))
            facts = {"w": w, "snapshot": sha256_of(snapshot)}
            found = factorised.pca(count, chosen, **facts) if kind == "pca" else factorised.sefa(
                generator, count, chosen, **facts)  # fmt: skip
            _write(found, generator, snapshot, shown, psi, out, batch, bars)

    return command


for _kind, _help in FACTORISED.items():
    app.command(_kind, help=_help)(_factorised(_kind))


@app.command()
def svm(
    snapshot: options.SnapshotFile,
    attributes: Annotated[Path, typer.Option(help="Attribute classifier, from tools/fit_attributes.py.")],
    name: Annotated[
        list[str] | None, typer.Option(help="An attribute, repeatable; by default all that the classifier can tell.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=round(FEWEST / SHARE), help="Random images; InterFaceGAN takes 500000.")
    ] = 20000,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the random images.")] = 0,
    allow_weak: Annotated[
        bool, typer.Option("--allow-weak", help="Also attributes that the classifier tells poorly.")
    ] = False,
    seeds: Seeds = "0-2",
    psi: options.Psi = 0.7,
    out: Out = DEFAULT,
    batch: options.Batch = BATCH,
) -> None:
    """A direction for each attribute of a classifier (InterFaceGAN).

    Example:

      python tools/directions.py svm model.safetensors --attributes attributes.safetensors
    """
    with Bars() as bars:
        _check_out(out)
        check_psi(psi)
        shown = parse_seeds(seeds)
        generator, _ = load_snapshot(snapshot)
        classifier = load_attributes(attributes).restricted(name, allow_weak=allow_weak)
        check_memory(samples, 4 * (generator.w_dim + len(classifier.names)))
        generator = place(generator)
        device = generator.mapping.w_avg.device
        found = random_samples(
            generator, classifier.to(device), count=samples, seed=seed, world=World(0, 1, 0, 1, device),
            class_counts=[1] * generator.c_dim,  # as tools/sample.py draws them
            told=_Counter(bars, "sampling", samples),
        )  # fmt: skip
        directions = fit_directions(
            found.w.numpy(), found.logits.numpy(), classifier.names, seed=seed, snapshot=sha256_of(snapshot),
            progress=_Counter(bars, "fitting", len(classifier.names)),
        )  # fmt: skip
        _write(directions, generator, snapshot, shown, psi, out, batch, bars)


@app.command("name")
def rename(
    file: Annotated[Path, typer.Argument(help="A directions file.")],
    names: Annotated[list[str], typer.Argument(help="old=new, such as pca0=pose.")],
) -> None:
    """Give directions names of your own.

    Example:

      python tools/directions.py name directions.safetensors pca0=pose pca3=age
    """
    directions = load_directions(file)
    known = list(directions.names)
    for pair in names:
        old, equals, new = pair.partition("=")
        if not (equals and new) or old not in known:
            hint = nearest(old, known) if equals and new else ": write it like pca0=pose"
            raise UserError(f"{pair}: {file} has no direction {old!r}{hint}")
        if new in known:
            raise UserError(f"{pair}: {file} has a direction {new!r} already; choose another name")
        known[known.index(old)] = new
    with safe_open(file, "pt") as opened:
        command = opened.metadata()["command"]
    _save(dataclasses.replace(directions, names=tuple(known)), file, command)
    typer.echo(f"{file}: {', '.join(known)}")


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name must end in .safetensors; .png and .json are written beside it")
    for suffix in (".safetensors", ".json", ".png"):
        options.check_file(out.with_suffix(suffix))


def _write(
    directions: Directions, generator: Generator, snapshot: Path, seeds: list[int], psi: float, out: Path, batch: int,
    bars: Bars,
) -> None:  # fmt: skip
    options.make_folder(out)
    _save(directions, out, shlex.join(["python", "tools/directions.py", *sys.argv[1:]]))
    ws = truncated(generator, ws_of_seeds(generator, seeds, batch=batch), psi, None)
    save_png(contact_sheet(generator, directions, ws, batch=batch, bars=bars), out.with_suffix(".png"))
    Console().print(_table(directions))
    typer.echo(f"{out}, {out.with_suffix('.json')} and {out.with_suffix('.png')}, where every direction is shown from "
               f"{STRENGTHS[0]} to {STRENGTHS[-1]}")  # fmt: skip
    use = ["tools/sample.py", str(snapshot), "--directions", str(out), "--edit", f"{directions.names[0]}=2"]
    typer.echo(f"use it with {shlex.join(use)}")


def _save(directions: Directions, out: Path, command: str) -> None:
    """The file, and its figures as .json beside it."""
    save_directions(out, directions, command=command)
    facts = {"kind": directions.kind, "snapshot_sha256": directions.snapshot, "samples": directions.samples}
    facts["directions"] = [
        {"name": name, MEASURES[directions.kind]: quality, "std": std, "layers": layers}
        for name, quality, std, layers in zip(
            directions.names, directions.quality, directions.std, directions.layers, strict=True
        )
    ]
    with written_aside(out.with_suffix(".json")) as aside:
        aside.write_text(json.dumps({**facts, "command": command}, indent=2) + "\n", encoding="utf-8")


def _table(directions: Directions) -> Table:
    table = Table(title=f"{directions.kind} directions from {directions.samples} samples")
    for heading in ("direction", MEASURES[directions.kind].replace("_", " "), "std of w along it"):
        table.add_column(heading, justify="left" if heading == "direction" else "right")
    for name, quality, std in zip(directions.names, directions.quality, directions.std, strict=True):
        table.add_row(name, f"{quality:.3f}", f"{std:.3f}")
    return table


if __name__ == "__main__":
    app()
