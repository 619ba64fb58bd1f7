"""ADA's transforms 1–7 (arXiv 2006.06676, appendix B): one resampling of the image through G⁻¹ = T₁⁻¹…Tₙ⁻¹.

Each transform is the inverse of its matrix in homogeneous pixel coordinates (x to the right, y down, the origin in the
image's centre): where an output pixel comes from.

    warp(x)  =  keep 0::2 of  h ⋆ sample at G⁻¹ of  h ∗ zero-insert 2 of  x mirrored by W − 1 and H − 1 on each side

h is the low-pass of the wavelet sym6, whose even shifts are orthonormal, so that the identity changes nothing. ADA
mirrors only as far as the batch's corners reach, at most as far as here; beyond it reads zeros. Its shapes therefore
depend on the draws and its images on their batch; here neither does. The canvas is 36 times the image, but transient:
the map is linear in x, so that nothing of the canvas is kept for the backward pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Function

from hsrgan.engine.augment_numbers import Numbers, product
from hsrgan.kernels import upfirdn2d

SYM6 = (  # scaling filter of the wavelet sym6 (Daubechies, Ten Lectures, table 6.3), Σ = √2
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
MARGIN = 3  # pixels around the output that h reaches: half of its taps, at twice the resolution
CANVAS = 2**27  # numbers in the canvases of the images that are warped at a time: 512 MiB in fp32, one 1024² image


def low_pass(device: torch.device | str = "cpu") -> Tensor:
    """h [12], sum 1, fp64."""
    return torch.tensor([tap / sum(SYM6) for tap in SYM6], dtype=torch.float64, device=device)


def affine(*entries: Tensor | float) -> Tensor:
    """[n, 3, 3] with the first two rows a, b, c, d, e, f: [n] or a number, at least one of them [n]."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    rows = [entry if isinstance(entry, Tensor) else torch.full_like(like, entry) for entry in (*entries, 0, 0, 1)]
    return torch.stack(rows, 1).view(-1, 3, 3)


def rotation(angle: Tensor) -> Tensor:
    """[n, 3, 3] of an angle in radians, from x towards y."""
    return affine(angle.cos(), -angle.sin(), 0, angle.sin(), angle.cos(), 0)


def x_flip(numbers: Numbers, height: int, width: int) -> Tensor:
    """1: i ∈ {0, 1}."""
    return affine(1 - 2 * numbers.gated("flip?", (numbers["flip"] * 2).floor(), 0), 0, 0, 0, 1, 0)


def quarter_turns(numbers: Numbers, height: int, width: int) -> Tensor:
    """2: by 90°·i, i ∈ {0, 1, 2, 3}."""
    return rotation(numbers.gated("turn?", (numbers["turn"] * 4).floor(), 0) * (math.pi / 2))


def integer_shift(numbers: Numbers, height: int, width: int) -> Tensor:
    """3: round(U(−.125, .125)·size), one gate for both axes."""
    x, y = (
        numbers.gated("jump?", ((numbers[name] * 2 - 1) * (0.125 * size)).round(), 0)
        for name, size in (("jump_x", width), ("jump_y", height))
    )
    return affine(1, 0, -x, 0, 1, -y)


def scale(numbers: Numbers, height: int, width: int) -> Tensor:
    """4: by 2^N(0, .2²)."""
    inverse = numbers.gated("scale?", -0.2 * numbers["scale"], 0).exp2()
    return affine(inverse, 0, 0, 0, inverse, 0)


def _spin(numbers: Numbers, name: str) -> Tensor:
    """By U(−π, π); either of the two rotations is on with probability p."""
    angle = (numbers[name] * 2 - 1) * math.pi
    return rotation(numbers.gated(f"{name}?", angle, 0, p=1 - (1 - numbers.p).sqrt()))


def spin(numbers: Numbers, height: int, width: int) -> Tensor:
    """5: rotation before 6."""
    return _spin(numbers, "spin")


def stretch(numbers: Numbers, height: int, width: int) -> Tensor:
    """6: by (s, 1/s), s = 2^N(0, .2²)."""
    exponent = numbers.gated("stretch?", 0.2 * numbers["stretch"], 0)
    return affine((-exponent).exp2(), 0, 0, 0, exponent.exp2(), 0)


def respin(numbers: Numbers, height: int, width: int) -> Tensor:
    """5′: rotation after 6."""
    return _spin(numbers, "respin")


def shift(numbers: Numbers, height: int, width: int) -> Tensor:
    """7: N(0, .125²)·size, one gate for both axes."""
    x, y = (
        numbers.gated("move?", numbers[name] * (0.125 * size), 0)
        for name, size in (("move_x", width), ("move_y", height))
    )
    return affine(1, 0, -x, 0, 1, -y)


BLIT = (x_flip, quarter_turns, integer_shift)
GEOMETRY = (scale, spin, stretch, respin, shift)


def inverse(numbers: Numbers, transforms: tuple, height: int, width: int) -> Tensor:
    """G⁻¹ [n, 3, 3] of some of BLIT + GEOMETRY, in that order."""
    first, *others = (transform(numbers, height, width) for transform in transforms)
    for other in others:
        first = product(first, other)
    return first


def mirrored(x: Tensor, margin: int, dim: int) -> Tensor:
    """x with `margin` more pixels at both ends of `dim` (of 2 or more), mirrored about the outermost pixel, as often as
    it takes.

    As F.pad's reflect, but its gradient is a sum in a fixed order.
    """
    while margin > 0:
        last = x.shape[dim] - 1
        step = min(margin, last)
        before, after = x.narrow(dim, 1, step).flip(dim), x.narrow(dim, last - step, step).flip(dim)
        x, margin = torch.cat([before, x, after], dim), margin - step
    return x


class _Sample(Function):
    """(x [n, C, h, w], grid [n, H, W, 2]) → [n, C, H, W], bilinear, zeros beyond x; not differentiable in the grid.

    Native grid_sample would keep x for the gradient of the grid.
    """

    @staticmethod
    def forward(ctx, x, grid):
        ctx.save_for_backward(grid)
        ctx.size = x.shape[2:]
        return torch.ops.aten.grid_sampler_2d(x, grid, 0, 0, False)

    @staticmethod
    def backward(ctx, g):
        return _Spread.apply(g, ctx.saved_tensors[0], ctx.size), None


class _Spread(Function):
    """The adjoint of `_Sample`, whose own adjoint is `_Sample` again. On a GPU it adds up in no fixed order."""

    @staticmethod
    def forward(ctx, g, grid, size):
        ctx.save_for_backward(grid)
        x = g.new_zeros(()).expand(*g.shape[:2], *size)  # only its shape matters where the grid needs no gradient
        return torch.ops.aten.grid_sampler_2d_backward(g, x, grid, 0, 0, False, [True, False])[0]

    @staticmethod
    def backward(ctx, g):
        return _Sample.apply(g, ctx.saved_tensors[0]), None, None


def _grid(inverse: Tensor, height: int, width: int) -> Tensor:
    """Where the canvas at twice the resolution is sampled, [n, 2(H + 6), 2(W + 6), 2] of −1 … 1 over the canvas."""
    x, y = (
        torch.arange(1, 2 * reach + 1, dtype=inverse.dtype, device=inverse.device) / 2 - reach / 2
        for reach in (width + 2 * MARGIN, height + 2 * MARGIN)
    )
    coordinates = []
    for row, size in ((0, width), (1, height)):
        a, b, c = (inverse[:, row, column, None, None] for column in range(3))
        coordinates.append(((a * x + b * y[:, None] + c) * 2 - 0.5) / (3 * size - 2))
    return torch.stack(coordinates, 3)


def _warped(x: Tensor, inverse: Tensor, h: Tensor) -> Tensor:
    height, width = x.shape[2:]
    grid, row, column = _grid(inverse, height, width), h[None], h[:, None]
    x = upfirdn2d(mirrored(x, width - 1, 3), row, up=(2, 1), padding=(6, 5, 0, 0), gain=2)
    x = upfirdn2d(mirrored(x, height - 1, 2), column, up=(1, 2), padding=(0, 0, 6, 5), gain=2)
    x = _Sample.apply(x, grid)
    x = upfirdn2d(x, row, down=(2, 1), padding=(-1, -1, 0, 0), flip_filter=True)
    return upfirdn2d(x, column, down=(1, 2), padding=(0, 0, -1, -1), flip_filter=True)


def warp(x: Tensor, inverse: Tensor, h: Tensor) -> Tensor:
    """x [n, C, H, W] through inverse [n, 3, 3] (G⁻¹, no gradient), with `low_pass`. Differentiable any number of times
    in x. What comes from more than W − 1 (H − 1) beyond the image is zero.
    """
    height, width = x.shape[2:]
    chunk = max(1, CANVAS // (4 * x.shape[1] * (3 * height - 2) * (3 * width - 2)))
    pairs = zip(x.contiguous().split(chunk), inverse.detach().split(chunk), strict=True)
    return torch.cat([_warped(part, g, h) for part, g in pairs])
