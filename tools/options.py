"""Options that several tools have, under one name and with one meaning, and what they are checked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from typer.models import OptionInfo

from hsrgan.engine.aside import check_writable, writable
from hsrgan.engine.errors import UserError
from hsrgan.engine.labels import multi_hot, parse_label
from hsrgan.engine.latents import Latents, load_latents
from hsrgan.engine.model import Generator
from hsrgan.engine.sampler import Noise, parse_seeds, ws_of_seeds
from hsrgan.engine.snapshot import read_metadata

REMEDY = "name another --out"

SnapshotFile = Annotated[Path, typer.Argument(help="A .safetensors file from a run's snapshots folder.")]
Psi = Annotated[float, typer.Option(help="Truncation: 1 = none, 0 = the average picture.")]
Cutoff = Annotated[int | None, typer.Option(min=1, help="Truncate only this many ws, the coarsest.")]
NoiseMode = Annotated[
    Noise,
    typer.Option(help="Layer noise: the stored constant (or the noise in the file of --w), drawn by seed, or none."),
]
LatentsFile = Annotated[
    Path | None,
    typer.Option("--w", help="Begin from this file (.safetensors or .npz with `w`, [N, w_dim] or [N, num_ws, w_dim]) "
                 "in place of --seeds."),
]  # fmt: skip
Edit = Annotated[
    list[str] | None,
    typer.Option(help="name=strength, repeatable: change by so many standard deviations of w. One may be a range, "
                 "name=-3:3."),
]  # fmt: skip
DirectionsFiles = Annotated[
    list[Path] | None,
    typer.Option(help="The directions of --edit, made by tools/directions.py; repeatable."),
]
Batch = Annotated[int, typer.Option(min=1, help="Images made at a time.")]


@dataclass(frozen=True)
class Start:
    """Where pictures begin: their names, and the seeds they come from; or of a file its latents, and the numbers of its
    rows for seeds.
    """

    names: list[str]
    seeds: list[int]
    file: Latents | None = None

    def ws(self, generator: Generator, c: Tensor | None, batch: int) -> Tensor:
        """[N, num_ws, w_dim] on the CPU, not truncated; c [c_dim] or [N, c_dim]; None: every seed draws its class."""
        if self.file is not None:
            return self.file.w.expand(-1, generator.num_ws, -1)
        return ws_of_seeds(generator, self.seeds, None if c is None else c.expand(len(self.seeds), -1), batch=batch)


def read_start(seeds: str | None, file: Path | None, label: str | None, generator: Generator, *, default: str) -> Start:
    """What `--seeds` (or `default`) or `--w` says. Raises `UserError`."""
    if file is None:
        chosen = parse_seeds(default if seeds is None else seeds)
        return Start([f"seed{seed:04d}" for seed in chosen], chosen)
    for option, value in {"--seeds": seeds, "--label": label}.items():
        if value is not None:
            raise UserError(f"{option} {value} with --w {file}: the file says what the pictures are; drop one of them")
    latents = load_latents(file)
    latents.expect(generator, file)
    numbers = list(range(len(latents.w)))
    return Start([f"w{i:04d}" for i in numbers], numbers, latents)


def check_cutoff(cutoff: int | None, generator: Generator, snapshot: Path) -> None:
    if cutoff is not None and cutoff > generator.num_ws:
        raise UserError(f"--cutoff {cutoff}: {snapshot} has {generator.num_ws} ws; give 1 to {generator.num_ws}")


def read_label(
    label: str | None, generator: Generator, snapshot: Path, dataset: dict
) -> list[tuple[str, Tensor | None]]:
    """What `--label` names: words for a file's name and c [c_dim] of each label; one ("", None) where every seed draws
    its own class or the model has none. dataset: the facts in the snapshot's metadata.
    """
    if label is None:
        return [("", None)]
    if not generator.c_dim:
        raise UserError(f"--label {label}: {snapshot} was trained without labels; leave --label out")
    if label == "all":
        chosen = [(i,) for i in range(generator.c_dim)]
    else:
        chosen = [parse_label(
            label, generator.c_dim, dataset.get("class_names") or (), several=dataset.get("multi_label", False),
            where=f"--label {label}: {snapshot}",
        )]  # fmt: skip
    words = [f"class{'+'.join(map(str, label))}" for label in chosen]
    return list(zip(words, torch.from_numpy(multi_hot(chosen, generator.c_dim)), strict=True))


def seeds_option(default: str) -> OptionInfo:
    return typer.Option(help="Seeds, such as 0-63,100. One seed is one latent, always the same.", show_default=default)


def check_file(out: Path) -> None:
    """A UserError where no file `out` could be written, before hours of work."""
    if os.path.isdir(out):
        raise UserError(f"--out {out}: {out} is a folder; name another file")
    spare_snapshot(out)
    check_writable(out.parent, REMEDY, make=False)


def make_folder(out: Path) -> None:
    """Make the folder of a file that is about to be written, and not before: what is refused leaves none."""
    with writable(out.parent, REMEDY):
        out.parent.mkdir(parents=True, exist_ok=True)


def check_model_file(out: Path) -> None:
    """`check_file` of a .safetensors, before any other file, such as a shard, is taken for one to be replaced."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: the name must end in .safetensors")
    check_file(out)


def spare_snapshot(out: Path, option: str = "--out") -> None:
    """A UserError where `out` is a snapshot, which what a tool writes there would replace: hours of training."""
    try:
        read_metadata(out)
    except UserError:
        return
    raise UserError(f"{option} {out}: a snapshot is there, and would be lost; name another file")
