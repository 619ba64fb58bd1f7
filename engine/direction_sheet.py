"""One picture of every direction: what it changes in a few samples, from −3 to 3 standard deviations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hsrgan.engine.metrics.directions import Directions
from hsrgan.engine.metrics.report import Bars
from hsrgan.engine.model import Generator
from hsrgan.engine.pictures import image_grid
from hsrgan.engine.sampler import images_of, told

STRENGTHS = (-3, -2, -1, 0, 1, 2, 3)
TALLEST = 96  # pixels: larger images are made smaller
CAPTION = 14  # pixels above a row
GAP = 8  # pixels between samples


def contact_sheet(generator: Generator, directions: Directions, ws: Tensor, *, batch: int, bars: Bars) -> Image.Image:
    """A row for each direction; in it, for each of ws [N, num_ws, w_dim], the pictures at STRENGTHS. Constant noise."""
    steps = [directions.edit(name, 1.0, generator.num_ws) for name in directions.names]
    edited = torch.stack([w + strength * step for step in steps for w in ws for strength in STRENGTHS])
    made = told(images_of(generator, edited, batch=batch), bars, "contact sheet", len(edited))
    tiles = torch.cat([_small(images) for images in made])
    strips = [image_grid(part, cols=len(STRENGTHS)) for part in tiles.split(len(STRENGTHS))]
    return _laid_out(strips, [_caption(directions, i) for i in range(len(steps))], len(ws))


def _small(images: Tensor) -> Tensor:
    """Area-resized so that no side is above TALLEST."""
    by = -(-max(images.shape[2:]) // TALLEST)
    if by == 1:
        return images
    return torch.nn.functional.avg_pool2d(images.float(), by).round().to(torch.uint8)


def _caption(directions: Directions, i: int) -> str:
    layers = directions.layers[i]
    where = "" if layers is None else f", ws {layers[0]}-{layers[1]}"
    return f"{directions.names[i]}: {STRENGTHS[0]} to {STRENGTHS[-1]} std of {directions.std[i]:.3g}{where}"


def _laid_out(strips: Sequence[Image.Image], captions: Sequence[str], samples: int) -> Image.Image:
    width, height = strips[0].size
    sheet = Image.new(strips[0].mode, (samples * (width + GAP) - GAP, len(captions) * (height + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, strip in enumerate(strips):
        row, column = divmod(i, samples)
        top = row * (height + CAPTION)
        sheet.paste(strip, (column * (width + GAP), top + CAPTION))
        if column == 0:
            pen.text((2, top + 1), captions[row], fill="black")
    return sheet
