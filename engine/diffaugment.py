"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): color, translation and cutout, each on every image.

Functions of images x [n, C, H, W] and uniform numbers u [n, len(UNIFORM)], differentiable any number of times in x.
Colour acts on grey or RGB and leaves alpha alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIFORM = ("brightness", "saturation", "contrast", "shift_x", "shift_y", "cutout_x", "cutout_y")  # in [0, 1)


def color(x: Tensor, u: Tensor) -> Tensor:
    """+ U(−.5, .5); then, about the mean over channels, × U(0, 2); then, about the image's mean, × U(.5, 1.5)."""
    rgb, alpha = x[:, :3], x[:, 3:]
    brightness, saturation, contrast = (u[:, column, None, None, None] for column in range(3))
    rgb = rgb + (brightness - 0.5)
    mean = rgb.mean(1, keepdim=True)
    rgb = (rgb - mean) * (2 * saturation) + mean
    mean = rgb.mean((1, 2, 3), keepdim=True)
    rgb = (rgb - mean) * (contrast + 0.5) + mean
    return torch.cat([rgb, alpha], 1) if alpha.shape[1] else rgb


def translation(x: Tensor, u: Tensor) -> Tensor:
    """By a whole number of pixels, uniform over ±⅛ of either size; zeros move in."""
    for dim, column in ((3, 3), (2, 4)):
        size = x.shape[dim]
        reach = int(size / 8 + 0.5)
        shift = (u[:, column] * (2 * reach + 1)).floor().long() - reach
        source = torch.arange(size, device=u.device) - shift[:, None]
        inside = (source >= 0) & (source < size)
        view = (-1, 1, 1, size) if dim == 3 else (-1, 1, size, 1)
        x = x.gather(dim, source.clamp(0, size - 1).view(view).expand(x.shape)) * inside.view(view).to(x.dtype)
    return x


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """Zero in a rectangle of half of either size, its middle anywhere in the image."""
    near = []
    for dim, column in ((3, 5), (2, 6)):
        size = x.shape[dim]
        hole = int(size / 2 + 0.5)
        first = (u[:, column] * (size + 1 - hole % 2)).floor() - hole // 2
        offset = torch.arange(size, device=u.device) - first[:, None]
        near.append((offset >= 0) & (offset < hole))
    return x * (~(near[1][:, None, :, None] & near[0][:, None, None, :])).to(x.dtype)


POLICY = {"color": color, "translation": translation, "cutout": cutout}
