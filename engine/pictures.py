"""Image batches as pictures: one grid, large enough for a person to see, saved as PNG."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hsrgan.engine.aside import written_aside

VISIBLE_SIDE = 64  # pixels: smaller images are enlarged to about this
CHECK = 8, 153, 102  # a checkerboard's squares: pixels, light and dark grey


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] (any float dtype) as uint8 0…255, rounded; uint8 passes. The inverse of x/127.5 − 1."""
    if images.dtype == torch.uint8:
        return images
    return (images.detach().float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def image_grid(images: Tensor, *, cols: int | None = None, scale: int | None = None) -> Image.Image:
    """One picture of `images` [N, C, H, W] (grey, RGB or RGBA; uint8, or float in [-1, 1]), filled row by row.

    `cols` defaults to the least square that holds N. `scale` is a whole-number enlargement without smoothing, so that
    every generated pixel stays visible; by default images under 64 pixels are enlarged to about that side.
    """
    count, channels, height, width = images.shape
    cols = cols or math.ceil(math.sqrt(count))
    rows = math.ceil(count / cols)
    scale = scale or max(1, VISIBLE_SIDE // max(height, width))
    canvas = torch.zeros(rows * cols, channels, height, width, dtype=torch.uint8)
    canvas[:count] = to_uint8(images).cpu()
    canvas = canvas.reshape(rows, cols, channels, height, width).permute(0, 3, 1, 4, 2)
    canvas = canvas.reshape(rows * height, cols * width, channels)
    canvas = canvas.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return Image.fromarray((canvas[..., 0] if channels == 1 else canvas).numpy())


def opaque(picture: Image.Image) -> Image.Image:
    """A picture with alpha laid over a grey checkerboard, RGB; any other as it is."""
    if picture.mode != "RGBA":
        return picture
    side, light, dark = CHECK
    row, column = np.ogrid[: picture.height, : picture.width]
    board = np.where((row // side + column // side) % 2 == 0, light, dark).astype(np.uint8)
    return Image.alpha_composite(Image.fromarray(board).convert("RGBA"), picture).convert("RGB")


def save_png(picture: Image.Image, path: Path) -> None:
    """Write `picture` to `path` whole or not at all; raises `UserError` where the folder refuses."""
    with written_aside(path) as aside:
        picture.save(aside, format="PNG")
