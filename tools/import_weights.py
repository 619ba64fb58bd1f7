"""The networks behind published figures, from files that you have: checked, converted to safetensors, put in the cache.

`python tools/import_weights.py inception FILE`, then `vgg16`, `lpips` or `dinov2`. Nothing in a file is executed.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hsrgan.engine.errors import UserError, user_errors
from hsrgan.engine.metrics.weights import PUBLISHED, import_weights, packaged_heads

Network = enum.Enum("Network", {name: name for name in PUBLISHED}, type=str)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    network: Annotated[Network, typer.Argument(help="What the file is.")],
    file: Annotated[
        Path | None, typer.Argument(help="The downloaded file. lpips: by default the one in the lpips package.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to put it in, by default $HSRGAN_CACHE or ~/.cache/hsrgan/weights.")
    ] = None,
    own_weights: Annotated[
        bool, typer.Option("--own-weights", help="Take another file than the published one, such as your own network.")
    ] = False,
) -> None:
    """Check a weights file and convert it for the metrics.

    Examples:

      python tools/import_weights.py inception weights-inception-2015-12-05-6726825d.pth

      python tools/import_weights.py vgg16 vgg16-397923af.pth
    """
    with user_errors():
        name, known = network.value, PUBLISHED[network.value]
        if file is None:
            if name != "lpips" or own_weights:
                raise UserError(f"which file? Get {known.file} from {known.publisher} and name it after {name}")
            file = packaged_heads()
        path, weights = import_weights(name, file, cache=cache, own=own_weights)
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
