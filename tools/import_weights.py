"""Networks from files that you have, as safetensors: StyleGAN2 checkpoints, and the networks behind published figures.

`python tools/import_weights.py stylegan network.pkl out.safetensors`, and `inception FILE`, `vgg16`, `lpips` or
`dinov2` for the metrics. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.errors import UserError
from hsrgan.engine.import_rosinality import read_rosinality
from hsrgan.engine.import_stylegan import Imported, read_stylegan
from hsrgan.engine.metrics.weights import PUBLISHED, import_weights, packaged_heads
from hsrgan.engine.network_file import save_network
from hsrgan.engine.network_shapes import build
from hsrgan.engine.snapshot import save_snapshot
from hsrgan.engine.tensor_files import is_torch_file, sha256_of

app = CommandLine(no_args_is_help=True)


@app.callback()
def _main() -> None:
    """Check a weights file and convert it to safetensors. Nothing in it is executed.

    Examples:

      python tools/import_weights.py stylegan network-snapshot-025000.pkl ffhq.safetensors

      python tools/import_weights.py inception weights-inception-2015-12-05-6726825d.pth
    """


@app.command()
def stylegan(
    file: Annotated[Path, typer.Argument(help="network-snapshot-….pkl of stylegan2-ada-pytorch, stylegan3 "
                                         "(--cfg=stylegan2) or HSR, or a .pt of rosinality/stylegan2-pytorch.")],
    out: Annotated[Path, typer.Argument(help="The snapshot to write, .safetensors: the averaged generator, as "
                                        "tools/sample.py and tools/eval.py read it.")],
    every: Annotated[bool, typer.Option("--all", help="Write also out.G.safetensors, out.D.safetensors and HSR's "
                                        "out.heads.safetensors, which a training run can start from.")] = False,
) -> None:  # fmt: skip
    """Import a StyleGAN2 checkpoint.

    Examples:

      python tools/import_weights.py stylegan network-snapshot-025000.pkl ffhq.safetensors

      python tools/import_weights.py stylegan stylegan2-ffhq-config-f.pt ffhq.safetensors --all
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: the snapshot to write must end in .safetensors")
    if os.path.realpath(out) == os.path.realpath(file):
        raise UserError(f"{out} is the file to import: name another one to write")
    found = (read_rosinality if is_torch_file(file) else read_stylegan)(file, every=every)
    for line in write_imported(found, file, out):
        typer.echo(line)


def write_imported(found: Imported, file: Path, out: Path) -> list[str]:
    """Write the networks of `file`; what to say of them, a line each."""
    source = {"kind": found.kind, "file": file.name, "sha256": sha256_of(file)}
    averaged = found.networks["G_ema"]
    generator = build("G_ema", averaged.constructor)
    generator.load_state_dict(averaged.state)
    facts = averaged.constructor
    dataset = {"resolution": facts["img_resolution"], "class_names": None}
    recipe = json.dumps({"imported": source})
    save_snapshot(out, generator, recipe_json=recipe, kimg=found.kimg or 0, dataset=dataset)
    kimg = "not stated in the file (0 is written)" if found.kimg is None else f"{found.kimg:g}, by the file's name"
    said = [
        f"{file} is {found.kind}; kimg {kimg}",
        f"generator: {', '.join(f'{key} {value}' for key, value in facts.items())}",
        f"G_ema: {out}, {len(averaged.state)} tensors",
    ]
    for name, network in found.networks.items():
        if name != "G_ema":
            path = out.with_suffix(f".{name}.safetensors")
            save_network(path, name, network.constructor, network.state, source)
            said.append(f"{name}: {path}, {len(network.state)} tensors")
    return [*said, *found.notes, f"not imported: {', '.join(found.dropped) or 'nothing was left out'}"]


def _metric_command(name: str) -> Callable[..., None]:
    def command(
        file: Annotated[
            Path | None, typer.Argument(help="The downloaded file. lpips: by default the one in the lpips package.")
        ] = None,
        cache: Annotated[
            Path | None, typer.Option(help="Folder to put it in, by default $HSRGAN_CACHE or ~/.cache/hsrgan/weights.")
        ] = None,
        own_weights: Annotated[
            bool,
            typer.Option("--own-weights", help="Take another file than the published one, such as your own network."),
        ] = False,
    ) -> None:
        import_for_metrics(name, file, cache, own_weights)

    return command


for _name, _known in PUBLISHED.items():
    app.command(_name, help=f"Import {_known.file} for the metrics, from {_known.publisher}.")(_metric_command(_name))


def import_for_metrics(name: str, file: Path | None, cache: Path | None, own: bool) -> None:
    known = PUBLISHED[name]
    if file is None:
        if name != "lpips" or own:
            raise UserError(f"which file? Get {known.file} from {known.publisher} and name it after {name}")
        file = packaged_heads()
    path, weights = import_weights(name, file, cache=cache, own=own)
    typer.echo(f"{name}: {path} from {file}, {len(weights.tensors)} tensors, sha256 {weights.sha256}")
    if weights.own:
        Console(stderr=True).print(
            f"[bold red]WARNING: this is not {known.file}. Figures computed with it compare with nobody's "
            f"published ones, only with others computed with this same file; results say '{name} (own weights)'.[/]"
        )
    elif known.sha256 is None:
        typer.echo(f"We know no published sha256 of {known.file}: compare the one above with a copy you trust")
    else:
        typer.echo(f"It is the published {known.file}")


if __name__ == "__main__":
    app()
