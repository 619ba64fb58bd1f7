"""Pad, upsample, filter, downsample: the resampling of StyleGAN2.

    z = zeros between the samples of x (up·H × up·W), then padded (or cropped, where a padding is negative)
    y[n,c,i,j] = gain · Σ_{a,b} f[a,b] · z[n,c, down·i + A−1−a, down·j + B−1−b]        f is A × B

A true convolution with f, or, with flip_filter, a correlation; both are one for the symmetric [1,3,3,1] of StyleGAN2.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrgan.kernels import launch

Pair = int | tuple[int, int] | list[int]


def pair(value: Pair, name: str) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
    ok = len(both) == 2 and all(isinstance(v, int) and 1 <= v <= 4 for v in both)
    launch.check(ok, f"{name} must be 1 … 4, one whole number or (x, y); got {value}")
    return both


def paddings(padding: int | tuple[int, ...] | list[int]) -> tuple[int, int, int, int]:
    """(x0, x1, y0, y1) of an int, an (x, y) or an (x0, x1, y0, y1)."""
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding) if isinstance(padding, tuple | list) else ()
    if len(sides) == 2:
        sides = (sides[0], sides[0], sides[1], sides[1])
    if len(sides) != 4 or not all(isinstance(side, int) for side in sides):
        raise ValueError(f"padding must be an int, (x, y) or (x0, x1, y0, y1); got {padding}")
    return sides


def padded(x: Tensor, sides: tuple[int, ...] | list[int]) -> Tensor:
    """x with zeros around it, cropped where a side is negative: in this order, so that a crop may reach into the zeros
    of the other side (F.pad crops first, and raises there)."""
    for part in ([max(side, 0) for side in sides], [min(side, 0) for side in sides]):
        x = F.pad(x, part) if any(part) else x
    return x


def upfirdn2d_torch(
    x: Tensor,
    f: Tensor | None,
    *,
    up: Pair = 1,
    down: Pair = 1,
    padding: int | tuple[int, ...] | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """The definition of `upfirdn2d`: insert zeros, pad, a depthwise convolution, keep every down-th pixel."""
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = pair(up, "up"), pair(down, "down"), paddings(padding)
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, ux - 1, 0, 0, 0, uy - 1)).reshape(n, c, h * uy, w * ux)
    x = padded(x, (x0, x1, y0, y1))
    f = torch.ones(1, 1) if f is None else f
    f = torch.outer(f, f) if f.ndim == 1 else f
    f = (f if flip_filter else f.flip(0, 1)).to(x)
    x = F.conv2d(x, (f * gain).expand(c, 1, *f.shape), groups=c)
    return x[:, :, ::dy, ::dx]


def _filter(x: Tensor, f: Tensor, up: tuple[int, int], down: tuple[int, int], sides: tuple[int, ...]) -> Tensor:
    """z filtered by convolution with f [A, B], by one depthwise (transposed) convolution where one of up, down is 1."""
    c = x.shape[1]
    (x0, x1, y0, y1), (b, a) = sides, (f.shape[1], f.shape[0])
    if up == (1, 1):
        if x0 != x1 or y0 != y1 or min(sides) < 0:
            x, x0, y0 = padded(x, sides), 0, 0
        weight = f.flip(0, 1).expand(c, 1, a, b)
        return F.conv2d(x, weight, stride=down[::-1], padding=(y0, x0), groups=c)
    if down == (1, 1):
        # a transposed convolution gives every output that f touches: crop what lies beyond the padding asked for
        crop = (b - 1 - x0, b - up[0] - x1, a - 1 - y0, a - up[1] - y1)
        even = crop[0] == crop[1] and crop[2] == crop[3] and min(crop) >= 0
        pad = (crop[2], crop[0]) if even else (0, 0)
        # in fp32 on a CPU: oneDNN has no fast depthwise transposed convolution in half precision (measured: 40 times)
        wide = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        y = F.conv_transpose2d(x.to(wide), f.to(wide).expand(c, 1, a, b), stride=up[::-1], padding=pad, groups=c)
        y = y.to(x.dtype)
        return y if even else padded(y, [-side for side in crop])
    y = upfirdn2d_torch(x, f, up=up, down=down, padding=sides)
    is_nhwc = x.is_contiguous(memory_format=torch.channels_last)
    return y.contiguous(memory_format=torch.channels_last if is_nhwc else torch.contiguous_format)


class _UpFirDn(torch.autograd.Function):
    """x → upfirdn2d(x). Its gradient exchanges up and down and mirrors the filter: an upfirdn2d again."""

    @staticmethod
    def forward(ctx, x, f, up, down, sides):
        ctx.save_for_backward(f)
        ctx.up, ctx.down, ctx.sides, ctx.size = up, down, sides, x.shape[2:]
        return _filter(x, f, up, down, sides)

    @staticmethod
    def backward(ctx, g):
        (f,) = ctx.saved_tensors
        (ux, uy), (dx, dy), (x0, _, y0, _), (h, w) = ctx.up, ctx.down, ctx.sides, ctx.size
        x1 = w * ux - g.shape[3] * dx + x0 - ux + 1
        y1 = h * uy - g.shape[2] * dy + y0 - uy + 1
        sides = (f.shape[1] - 1 - x0, x1, f.shape[0] - 1 - y0, y1)
        return _UpFirDn.apply(g, f.flip(0, 1), ctx.down, ctx.up, sides), None, None, None, None


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    *,
    up: Pair = 1,
    down: Pair = 1,
    padding: int | tuple[int, ...] | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsample x by zeros, pad, filter with f, downsample; dtype and memory format of x.

    x [N, C, H, W]; f [A, B], [A] (separable, applied along both axes) or None (identity), a constant; up, down: int or
    (x, y); padding in pixels after upsampling: int, (x, y) or (x0, x1, y0, y1), negative crops.
    up and down lie in 1 … 4. Output height: (H·up + y0 + y1 − A) // down + 1, at least 1. Differentiable any number of
    times in x (f is not). ValueError names an argument that does not fit.
    """
    launch.check_images(x)
    check_filter(f, x)
    up, down, sides = pair(up, "up"), pair(down, "down"), paddings(padding)
    output_shape(x, f, up, down, sides)
    if launch.backend(x) == "triton":
        from hsrgan.kernels.upfirdn2d_triton import upfirdn2d_triton

        return upfirdn2d_triton(x, f, up, down, sides, flip_filter, gain)
    f = x.new_ones(1, 1) if f is None else f.detach()
    f = f.outer(f) if f.ndim == 1 else f
    f = ((f.flip(0, 1) if flip_filter else f) * gain).to(x)
    return _UpFirDn.apply(x, f, up, down, sides)


def check_filter(f: Tensor | None, x: Tensor) -> None:
    """Raise ValueError for an f that `upfirdn2d` of x does not take."""
    if f is None:
        return
    if f.ndim not in (1, 2) or f.numel() == 0:
        raise ValueError(f"f must be a 1-d or 2-d filter, or None; got shape {list(f.shape)}")
    launch.check_devices(x, f=f)


def output_shape(
    x: Tensor, f: Tensor | None, up: tuple[int, int], down: tuple[int, int], sides: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """[N, C, height, width] of upfirdn2d(x, f); ValueError where no pixel is left."""
    a, b = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    h = (x.shape[2] * up[1] + sides[2] + sides[3] - a) // down[1] + 1
    w = (x.shape[3] * up[0] + sides[0] + sides[1] - b) // down[0] + 1
    if h < 1 or w < 1:
        raise ValueError(f"padding {sides} leaves an output of {h}×{w} pixels of x {list(x.shape)}; f has {a}×{b} taps")
    return x.shape[0], x.shape[1], h, w


def up_padding(taps: int) -> tuple[int, int]:
    """(before, after) for upsampling by 2 so that the size exactly doubles: 4 taps → (2, 1)."""
    return (taps + 1) // 2, (taps - 2) // 2


def down_padding(taps: int) -> tuple[int, int]:
    """(before, after) for downsampling by 2 so that the size exactly halves: 4 taps → (1, 1)."""
    return (taps - 1) // 2, (taps - 2) // 2


def _image_sides(f: Tensor, pads: Callable[[int], tuple[int, int]]) -> tuple[int, int, int, int]:
    launch.check(f is not None and f.ndim in (1, 2), "f must be a 1-d or 2-d filter")
    return (*pads(f.shape[-1]), *pads(f.shape[0]))


def upsample2d_torch(x: Tensor, f: Tensor, *, gain: float = 1.0) -> Tensor:
    """The definition of `upsample2d`."""
    return upfirdn2d_torch(x, f, up=2, padding=_image_sides(f, up_padding), gain=4 * gain)


def downsample2d_torch(x: Tensor, f: Tensor, *, gain: float = 1.0) -> Tensor:
    """The definition of `downsample2d`."""
    return upfirdn2d_torch(x, f, down=2, padding=_image_sides(f, down_padding), gain=gain)


def upsample2d(x: Tensor, f: Tensor, *, gain: float = 1.0) -> Tensor:
    """[N, C, H, W] → [N, C, 2H, 2W] with the filter f (sum 1): brightness is kept, the factor 4 is inside."""
    return upfirdn2d(x, f, up=2, padding=_image_sides(f, up_padding), gain=4 * gain)


def downsample2d(x: Tensor, f: Tensor, *, gain: float = 1.0) -> Tensor:
    """[N, C, H, W] → [N, C, H//2, W//2] with the filter f (sum 1)."""
    return upfirdn2d(x, f, down=2, padding=_image_sides(f, down_padding), gain=gain)


def downsample2d_branch_torch(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `downsample2d_branch`."""
    return downsample2d_torch(x, f), x


def downsample2d_branch(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """(`downsample2d` of x, x itself): for a residual block, whose other branch takes the x that is returned.

    The gradient of that branch then comes through here, and the FIR adds it in its own pass over memory, where autograd
    would write both and read both again to add them. Differentiable any number of times in x.
    """
    launch.check_images(x)
    check_filter(f, x)
    sides = _image_sides(f, down_padding)
    output_shape(x, f, (1, 1), (2, 2), sides)
    if launch.backend(x) == "triton":
        from hsrgan.kernels.upfirdn2d_triton import Branch, has_fast_path

        if has_fast_path(f, (1, 1), (2, 2)):
            return Branch.apply(x, f.detach(), (1, 1), (2, 2), sides, False, 1.0)
    return downsample2d(x, f), x
