"""How uint8 images of any size come to a network's input size: the three readings that published metrics use.

All take uint8 [N, C, H, W] and give fp32 [N, C, size, size] on the scale 0…255.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1(images: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear (`align_corners=False`): asymmetric and without antialias.

    src = dst·in/out, lo = ⌊src⌋, hi = min(lo+1, in−1). The position is a product of two fp32 numbers, as theirs is:
    exact arithmetic would put some pixels into the next cell.
    """
    x = images.float()
    top, bottom, down = _cells(x.shape[2], size, x)
    left, right, across = _cells(x.shape[3], size, x)
    rows = x[:, :, top].lerp(x[:, :, bottom], down[:, None])
    return rows[..., left].lerp(rows[..., right], across)


def _cells(old: int, new: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `new` places on an axis of `old` pixels: the pixel at or before, the one after, the way between."""
    place = torch.arange(new, dtype=torch.float32, device=like.device) * (old / new)
    low = place.long()
    return low, (low + 1).clamp_max(old - 1), place - low


def clean(images: Tensor, size: int) -> Tensor:
    """Bicubic (a = −½) with antialias, clamped to 0…255 and not rounded: clean-fid's within 5e-3 (arXiv 2104.11222)."""
    return bicubic(images, size).clamp(0, 255)


def bicubic(images: Tensor, size: int) -> Tensor:
    """Bicubic (a = −½) with antialias, neither clamped nor rounded: FD-DINOv2's (EDM2, arXiv 2312.02696)."""
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)


RESIZES = {"tf1": tf1, "clean": clean, "bicubic": bicubic}
