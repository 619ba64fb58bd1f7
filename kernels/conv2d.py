"""Convolution with StyleGAN2's resampling.

    up = down = 1     y = w ⋆ x                                       "same" zero padding
    up = 2, 3×3       y = 4·f ∗ (wᵀ stride 2 of x), FIR pad [1, 1]    transposed convolution, then the FIR
    up = 2, 1×1       y = upsample(w ⋆ x)
    down = 2, 3×3     y = (w stride 2) ⋆ (f ∗ x), FIR pad [2, 2]
    down = 2, 1×1     y = w ⋆ downsample(x)

⋆ is PyTorch's convolution (a correlation with the stored weight); paddings are those of a 4-tap f.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import bias_act
from hsrgan.kernels.convolution import Convolution, Geometry, pair_of, tile_of
from hsrgan.kernels.upfirdn2d import (
    down_padding,
    downsample2d,
    downsample2d_torch,
    up_padding,
    upfirdn2d,
    upfirdn2d_torch,
    upsample2d,
    upsample2d_torch,
)


def conv2d_torch(
    x: Tensor, weight: Tensor, *, up: int = 1, down: int = 1, f: Tensor | None = None, weight_gain: float = 1
) -> Tensor:
    """The definition of `conv2d`."""
    k = weight.shape[-1]
    weight = (weight if weight_gain == 1 else weight * weight_gain).to(x.dtype)
    if up == 1 and down == 1:
        return F.conv2d(x, weight, padding=k // 2)
    if k == 1:
        return upsample2d_torch(F.conv2d(x, weight), f) if up == 2 else F.conv2d(downsample2d_torch(x, f), weight)
    if up == 2:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        return upfirdn2d_torch(x, f, padding=_sides(f, up_padding, -1, 0), gain=4)
    x = upfirdn2d_torch(x, f, padding=_sides(f, down_padding, 1, 1))
    return F.conv2d(x, weight, stride=2)


def _sides(f: Tensor, pads: Callable[[int], tuple[int, int]], before: int, after: int) -> tuple[int, int, int, int]:
    """`pads` for both axes of f, changed by what the 3×3 convolution itself pads (−) or crops (+)."""
    (x0, x1), (y0, y1) = pads(f.shape[-1]), pads(f.shape[0])
    return x0 + before, x1 + after, y0 + before, y1 + after


def check_conv2d(x: Tensor, weight: Tensor, up: int, down: int, f: Tensor | None) -> None:
    """Raise ValueError for arguments that `conv2d` does not take."""
    launch.check_images(x)
    k = weight.shape[-1]
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] != k or k % 2 == 0:
        raise ValueError(f"weight must be [Cout, {x.shape[1]}, k, k] with odd k; got {list(weight.shape)}")
    launch.check_devices(x, weight=weight, f=f)
    if (up, down) != (1, 1):
        launch.check((up, down) in ((2, 1), (1, 2)), f"up and down are 1, or one of them 2; got up={up}, down={down}")
        launch.check(k in (1, 3), f"resampling takes 1×1 and 3×3 weights; got {k}×{k}")
        launch.check(f is not None and f.ndim in (1, 2), "f, a 1-d or 2-d filter, is needed to resample")


def conv2d(
    x: Tensor, weight: Tensor, *, up: int = 1, down: int = 1, f: Tensor | None = None, blurred: bool = False,
    weight_gain: float = 1,
) -> Tensor:  # fmt: skip
    """Convolution that keeps the size, doubles it (up=2) or halves it (down=2); dtype and memory format of x.

    x [N, Cin, H, W]; weight [Cout, Cin, k, k], k odd (1 or 3 when resampling), times weight_gain (equalised learning
    rate) and cast to the dtype of x; f the resampling filter, 2-d or 1-d separable, a constant. blurred: x has been
    through the FIR already, of a 3×3 down=2 with `blur_padding`, of a 1×1 down=2 by `downsample2d`. Differentiable any
    number of times in x and weight.
    """
    check_conv2d(x, weight, up, down, f)
    x = before(x, weight, down, f, blurred)
    geometry = geometry_of(weight, up, down)
    x = convolution(x, weight, geometry, gain=weight_gain)
    return after(x, weight, up, f)


def geometry_of(weight: Tensor, up: int, down: int) -> Geometry:
    """Of the convolution inside `conv2d`, without the FIR."""
    k = weight.shape[-1]
    if k > 1 and max(up, down) == 2:
        return Geometry(k, 2, 0, transposed=up == 2)
    return Geometry(k, 1, k // 2)


def before(x: Tensor, weight: Tensor, down: int, f: Tensor | None, blurred: bool) -> Tensor:
    """The FIR in front of the convolution, where there is one."""
    if down == 1 or blurred:
        return x
    return downsample2d(x, f) if weight.shape[-1] == 1 else upfirdn2d(x, f, padding=blur_padding(f))


def after(x: Tensor, weight: Tensor, up: int, f: Tensor | None) -> Tensor:
    """The FIR behind the convolution, where there is one."""
    if up == 1:
        return x
    return upsample2d(x, f) if weight.shape[-1] == 1 else upfirdn2d(x, f, padding=transposed_padding(f), gain=4)


def convolution(
    x: Tensor, weight: Tensor, geometry: Geometry, style: Tensor | None = None, gain: float = 1,
    pair: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """gain·weight [Cout, Cin, k, k] ⋆ (x·style), style [N, Cin]: what is left of `conv2d` without the FIR.

    pair: the weight as `Convolution` takes it, what its gradient goes to and the cast, where they are there already.
    """
    tile = tile_of(x, len(weight), geometry, fused=style is not None)
    if tile is None and style is not None:
        # not inside the library's op: both of its gradients then come out of one pass over memory
        x, style = bias_act(x, demod=style, act="linear"), None
    if tile is None and geometry.k == 1 and x.is_contiguous(memory_format=torch.channels_last):
        # a matrix product, up to twice as fast; its gradients are too
        if pair is not None:
            weight = pair[0]
        elif gain != 1:
            weight = weight * gain
        return F.linear(x.permute(0, 2, 3, 1), weight.to(x.dtype).flatten(1)).permute(0, 3, 1, 2)
    if pair is None:
        pair = pair_of(weight.transpose(0, 1) if geometry.transposed else weight, gain, x)
    return Convolution.apply(x, pair[0], style, pair[1], geometry)


def transposed_padding(f: Tensor) -> tuple[int, int, int, int]:
    """Of the FIR behind the transposed convolution: (1, 1, 1, 1) for 4 taps."""
    return _sides(f, up_padding, -1, 0)


def blur_padding(f: Tensor) -> tuple[int, int, int, int]:
    """Of the FIR in front of a 3×3 convolution with down=2: (2, 2, 2, 2) for 4 taps."""
    return _sides(f, down_padding, 1, 1)
