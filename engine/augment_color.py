"""ADA's transforms 8–12 (arXiv 2006.06676, appendix B): one matrix C = Cₙ…C₁ in homogeneous RGB for each image.

Grey images take the mean of C's three rows, and no 11 or 12, which do nothing to grey. Alpha is left alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hsrgan.engine.augment_numbers import Numbers, product


def _color(diagonal: Tensor, after: Tensor, before: Tensor, offset: Tensor) -> Tensor:
    """[n, 4, 4]: on RGB the circulant whose first row is (diagonal, after, before), then offset; all [n]."""
    zero, one = torch.zeros_like(offset), torch.ones_like(offset)
    d, a, b, o = diagonal, after, before, offset
    return torch.stack([d, a, b, o, b, d, a, o, a, b, d, o, zero, zero, zero, one], 1).view(-1, 4, 4)


def _on_luma(luma: Tensor, rest: Tensor) -> Tensor:
    """luma·vvᵀ + rest·(I − vvᵀ), v = (1, 1, 1)/√3; both [n]."""
    off = (luma - rest) / 3
    return _color(rest + off, off, off, torch.zeros_like(luma))


def brightness(numbers: Numbers) -> Tensor:
    """8: + N(0, .2²)."""
    offset = numbers.gated("brightness?", 0.2 * numbers["brightness"], 0)
    zero = torch.zeros_like(offset)
    return _color(zero + 1, zero, zero, offset)


def contrast(numbers: Numbers) -> Tensor:
    """9: × 2^N(0, .5²)."""
    factor = numbers.gated("contrast?", 0.5 * numbers["contrast"], 0).exp2()
    zero = torch.zeros_like(factor)
    return _color(factor, zero, zero, zero)


def luma_flip(numbers: Numbers) -> Tensor:
    """10: I − 2i·vvᵀ, i ∈ {0, 1}."""
    i = numbers.gated("luma?", (numbers["luma"] * 2).floor(), 0)
    return _on_luma(1 - 2 * i, torch.ones_like(i))


def hue(numbers: Numbers) -> Tensor:
    """11: rotation about v by U(−π, π) (Rodrigues' formula)."""
    angle = numbers.gated("hue?", (numbers["hue"] * 2 - 1) * math.pi, 0)
    along, across = (1 - angle.cos()) / 3, angle.sin() / math.sqrt(3)
    return _color(angle.cos() + along, along - across, along + across, torch.zeros_like(angle))


def saturation(numbers: Numbers) -> Tensor:
    """12: vvᵀ + (I − vvᵀ)·2^N(0, 1)."""
    factor = numbers.gated("saturation?", numbers["saturation"], 0).exp2()
    return _on_luma(torch.ones_like(factor), factor)


COLOR = (brightness, contrast, luma_flip, hue, saturation)
GREY = COLOR[:3]


def matrix(numbers: Numbers, transforms: tuple) -> Tensor:
    """C [n, 4, 4] of some of COLOR, in that order."""
    first, *others = (transform(numbers) for transform in transforms)
    for other in others:
        first = product(other, first)
    return first


def recolor(x: Tensor, c: Tensor) -> Tensor:
    """C₃ₓ₃·RGB + C₃ₓ₁ of x [n, 1 (grey), 3 or 4 (alpha), H, W] by c [n, 4, 4]."""
    if x.shape[1] == 1:
        row = c[:, :3].mean(1)
        return x * row[:, :3].sum(1)[:, None, None, None] + row[:, 3, None, None, None]
    rgb = c[:, :3, 3, None, None]
    for channel in range(3):  # no matrix product: TF32 would round it to 10 bits of mantissa
        rgb = rgb + c[:, :3, channel, None, None] * x[:, channel : channel + 1]
    return rgb if x.shape[1] == 3 else torch.cat([rgb, x[:, 3:]], 1)
