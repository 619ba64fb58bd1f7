"""Interpolation videos: `python tools/video.py SNAPSHOT --seeds 0-7 --out walk.mp4`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from torch import Tensor

from hsrgan.engine.command_line import CommandLine
from hsrgan.engine.edits import Edits, read_edits
from hsrgan.engine.errors import UserError
from hsrgan.engine.latent_paths import KeyFrames, swing
from hsrgan.engine.metrics.report import Bars
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid
from hsrgan.engine.sampler import BATCH, Noise, NoiseRows, check_psi, images_of, layer_noise, place, truncated
from hsrgan.engine.snapshot import load_snapshot
from hsrgan.engine.video_file import load_av, mp4
from hsrgan.tools import options
from hsrgan.tools.options import Start

app = CommandLine()


def parse_grid(text: str) -> tuple[int, int]:
    """`3x2` → (3, 2): columns and rows. Raises `UserError`."""
    columns, _, rows = text.partition("x")
    if not (columns.isdecimal() and rows.isdecimal() and int(columns) and int(rows)):
        raise UserError(f"--grid {text}: write it like 3x2: three videos side by side, in two rows")
    return int(columns), int(rows)


def with_classes(start: Start, classes: list[Tensor | None]) -> tuple[Start, Tensor | None]:
    """The key frames and their c [1 or K, c_dim], None where every seed draws its own: of several classes each key
    frame has one, and a single seed is a key frame in each. Raises `UserError`.
    """
    if classes[0] is None:
        return start, None
    keys, several = len(start.names), len(classes)
    if several > 1 and keys == 1:
        start = Start(start.names * several, start.seeds * several)
    elif several not in (1, keys):
        raise UserError(f"--label names {several} classes for {keys} key frames: give one for all, one for each, or a "
                        "single seed")
    return start, torch.stack(classes)


@dataclass(frozen=True)
class Film:
    """The video's latents: a path for each cell of the grid, `count` frames, of which `per_key` lead from a key frame
    to the next.
    """

    paths: list[KeyFrames]
    edits: Edits
    count: int
    per_key: int
    loop: bool

    def ws(self, frames: range) -> Tensor:
        """[frames · cells, num_ws, w_dim], frame by frame."""
        times = torch.tensor(frames) / self.per_key
        moved = torch.stack([path.at(times) for path in self.paths], dim=1)
        whole = self.count if self.loop else max(self.count - 1, 1)
        strengths = [swing(self.edits.low, self.edits.high, frame / whole, loop=self.loop) for frame in frames]
        return (moved + torch.stack([self.edits.at(s) for s in strengths])[:, None]).flatten(0, 1)

    def pictures(
        self, generator: Generator, columns: int, *, noise_mode: str, noise: NoiseRows | None, batch: int
    ) -> Iterator[Image.Image]:
        """Frame after frame, the cells side by side in `columns`."""
        each = max(1, batch // len(self.paths))  # frames made at a time
        for first in range(0, self.count, each):
            frames = range(first, min(first + each, self.count))
            made = images_of(generator, self.ws(frames), noise_mode=noise_mode, noise=noise, batch=batch)
            for images in torch.cat(list(made)).split(len(self.paths)):
                yield image_grid(images, cols=columns)


@app.command()
def main(
    snapshot: options.SnapshotFile,
    seeds: Annotated[str | None, options.seeds_option("0-7")] = None,
    w: options.LatentsFile = None,
    grid: Annotated[
        str, typer.Option(help="Videos in one, columns x rows; the key frames are dealt out, the first ones to the "
                          "first.")
    ] = "1x1",
    seconds_per_key: Annotated[float, typer.Option(min=0.01, max=3600, help="From one key frame to the next.")] = 2.0,
    fps: Annotated[int, typer.Option(min=1, max=240, help="Frames a second.")] = 30,
    loop: Annotated[bool, typer.Option(help="End where it began.")] = True,
    psi: options.Psi = 1.0,
    cutoff: options.Cutoff = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A class by number or name (several with commas for a multi-label model), or 'all' of them. "
                     "Repeatable: one for each key frame, or a single seed goes through them. By default each seed "
                     "draws its class."),
    ] = None,
    noise: options.NoiseMode = Noise.const,
    edit: options.Edit = None,
    directions: options.DirectionsFiles = None,
    out: Annotated[Path, typer.Option(help="The .mp4 to write; its folder is made if absent.")] = Path("video.mp4"),
    batch: options.Batch = BATCH,
) -> None:  # fmt: skip
    """Make a video that moves through W: seeds are its key frames, a cubic spline leads from one to the next.

    Random noise is drawn once for each video of the grid and stays. An edit's range is gone through once, to and fro
    in a loop.

    Examples:

      python tools/video.py runs/quickstart/snapshots/000160000.safetensors --seeds 0-7

      python tools/video.py model.safetensors --seeds 0-35 --grid 3x2 --psi 0.7 --seconds-per-key 1.5 --out grid.mp4

      python tools/video.py labelled.safetensors --seeds 5 --label 3 --label 7 --out classes.mp4

      python tools/video.py model.safetensors --w projected.safetensors --directions d.safetensors --edit smile=-2:2
    """
    with Bars() as bars:
        load_av()
        if out.suffix != ".mp4":
            raise UserError(f"--out {out}: the video is an mp4; let its name end in .mp4")
        options.check_file(out)
        columns, rows = parse_grid(grid)
        check_psi(psi)
        generator, metadata = load_snapshot(snapshot)
        start = options.read_start(seeds, w, " ".join(label or []) or None, generator, default="0-7")
        options.check_cutoff(cutoff, generator, snapshot)
        labels = [options.read_label(one, generator, snapshot, metadata["dataset"]) for one in label or [None]]
        start, classes = with_classes(start, [c for named in labels for _, c in named])
        edits = read_edits(edit or [], directions or [], generator, snapshot)
        cells, per_key = columns * rows, max(1, round(fps * seconds_per_key))
        keys = len(start.names) // cells
        if len(start.names) % cells or not keys:
            raise UserError(f"--grid {grid}: {len(start.names)} key frames cannot be dealt out to {cells} videos; give "
                            f"{max(keys, 1) * cells} or {(max(keys, 1) + 1) * cells}")
        if keys == 1 and edits.step is None:
            raise UserError("nothing moves: give two key frames to every video, or an edit with a range, such as "
                            "--edit smile=-2:2")

        generator = place(generator)
        ws = truncated(generator, start.ws(generator, classes, batch), psi, cutoff)
        count = keys * per_key if loop or keys == 1 else (keys - 1) * per_key + 1
        film = Film([KeyFrames(part, loop=loop) for part in ws.split(keys)], edits, count, per_key, loop)
        held = None  # the noise of each video of the grid
        if noise is Noise.random:
            held = layer_noise(start.seeds[::keys], generator)
        elif noise is Noise.const and start.file is not None and start.file.noise is not None:
            held = start.file.noise[::keys]
        rows_of_noise = None if held is None else (lambda at: held[[i % cells for i in at]])
        pictures = film.pictures(generator, columns, noise_mode=noise.value, noise=rows_of_noise, batch=batch)
        bars("frames", 0, count)
        options.make_folder(out)
        with mp4(out, fps) as video:
            for done, picture in enumerate(pictures, 1):
                video.add(picture)
                bars("frames", done, count)
        typer.echo(f"{out}: {count} frames, {count / fps:.1f} s, {video.codec}")
        if any(side % 2 for side in picture.size):
            typer.echo(f"{picture.width}x{picture.height} pixels were made even: the last ones repeat")


if __name__ == "__main__":
    app()
