"""ADA's transforms 13–18 (arXiv 2006.06676, appendix B): four frequency bands amplified, noise, cutout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrgan.engine.augment_geometry import mirrored
from hsrgan.engine.augment_numbers import Numbers

SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)  # Σ = √2
POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # λ, of natural images in each band, low to high
_BANDS = range(4)


def _convolved(a: list[float], b: list[float]) -> list[float]:
    return [sum(a[k] * b[i - k] for k in range(len(a)) if 0 <= i - k < len(b)) for i in range(len(a) + len(b) - 1)]


def filter_bank(device: torch.device | str = "cpu") -> Tensor:
    """Four bands, low to high, that sum to the identity: [4, 43], fp64. A row is a symmetric filter."""
    low = list(SYM2)
    high = [(-1) ** k * tap for k, tap in enumerate(low)]
    low, high = ([tap / 2 for tap in _convolved(a, a[::-1])] for a in (low, high))
    rows = [[1.0], [0.0], [0.0], [0.0]]
    for band in _BANDS[1:]:
        spread = [[tap for value in row for tap in (value, 0.0)][:-1] for row in rows]
        rows = [_convolved(row, low) for row in spread]
        first = (len(rows[band]) - len(high)) // 2
        for k, tap in enumerate(high):
            rows[band][first + k] += tap
    return torch.tensor(rows, dtype=torch.float64, device=device)


def band_gains(numbers: Numbers) -> Tensor:
    """13–16: g [n, 4] = Π over the bands of t/√Σλt², t = 1 but tᵢ = 2^N(0, 1)."""
    gains = torch.ones_like(numbers.values[:, :4])
    for band in _BANDS:
        t = numbers.gated(f"band{band}?", numbers[f"band{band}"], 0).exp2()
        norm = (POWER[band] * t.square() + (1 - POWER[band])).sqrt()
        gains = gains * torch.stack([(t if other == band else 1) / norm for other in _BANDS], 1)
    return gains


def amplify(x: Tensor, gains: Tensor, bank: Tensor) -> Tensor:
    """x [n, C, H, W] with each band of both axes times its gain [n, 4]; mirrored beyond the edges."""
    n, c, h, w = x.shape
    kernel = (gains[:, :, None] * bank.to(gains.dtype)).sum(1)  # [n, 43]
    weight = kernel[:, None].expand(n, c, -1).reshape(n * c, 1, -1)  # one filter for each plane
    margin = bank.shape[1] // 2
    x = mirrored(mirrored(x.reshape(1, n * c, h, w), margin, 2), margin, 3)
    x = F.conv2d(x, weight[:, :, None], groups=n * c)
    return F.conv2d(x, weight[:, :, :, None], groups=n * c).reshape(n, c, h, w)


def noise_level(numbers: Numbers) -> Tensor:
    """17: σ [n] = |N(0, .1²)|."""
    return numbers.gated("noise?", 0.1 * numbers["noise"].abs(), 0)


def add_noise(x: Tensor, level: Tensor, field: Tensor) -> Tensor:
    """x + σ·field, field ~ N(0, 1) of x's shape."""
    return x + level[:, None, None, None] * field


def cutout_mask(numbers: Numbers, height: int, width: int) -> Tensor:
    """18: [n, 1, H, W], 0 where |(x + .5)/W − c_x| < .25 and likewise y, c ~ U(0, 1)²; 1 elsewhere."""
    near = []
    for name, size in (("cutout_x", width), ("cutout_y", height)):
        at = (torch.arange(size, dtype=numbers.values.dtype, device=numbers.values.device) + 0.5) / size
        near.append((at - numbers[name][:, None]).abs() < 0.25)
    hole = (near[1][:, :, None] & near[0][:, None]).to(numbers.values.dtype)
    return 1 - numbers.gated("cutout?", hole, 0)[:, None]
