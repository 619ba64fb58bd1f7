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


def conv2d_torch(x: Tensor, weight: Tensor, *, up: int = 1, down: int = 1, f: Tensor | None = None) -> Tensor:
    """The definition of `conv2d`."""
    k = weight.shape[-1]
    weight = weight.to(x.dtype)
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


class _Convolution(torch.autograd.Function):
    """x, w → the convolution, or its transpose (w is [Cout, Cin, k, k], or [Cin, Cout, k, k] for the transpose).

    Differentiable any number of times, because each gradient is one of these two Functions again. PyTorch's own second
    derivative of a convolution turns the batch into channels, which is many times slower on a CPU.
    """

    @staticmethod
    def forward(ctx, x, w, stride, padding, transposed, output_padding):
        ctx.save_for_backward(x, w)
        ctx.stride, ctx.padding, ctx.transposed = stride, padding, transposed
        return _aten_convolution(x, w, stride, padding, transposed, output_padding)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        s, p, k = ctx.stride, ctx.padding, w.shape[-1]
        want_x, want_w, *_ = launch.wanted(ctx)
        if x.is_contiguous(memory_format=torch.channels_last):
            g = g.contiguous(memory_format=torch.channels_last)  # a mixed pair would be reordered in every call below
        gx = gw = None
        if want_x:
            # rows that a strided convolution does not reach, which its transpose must still return
            left_over = [0, 0] if ctx.transposed else [(n + 2 * p - k) % s for n in x.shape[2:]]
            gx = _Convolution.apply(g, w, s, p, not ctx.transposed, left_over)
        if want_w:
            gw = _WeightGradient.apply(*((g, x) if ctx.transposed else (x, g)), k, s, p)
        return gx, gw, None, None, None, None


class _WeightGradient(torch.autograd.Function):
    """x [N, Cin, H, W], g [N, Cout, h, w] → Σ_n g ⋆ x [Cout, Cin, k, k]: the weight gradient of a convolution x → g."""

    @staticmethod
    def forward(ctx, x, g, k, stride, padding):
        ctx.save_for_backward(x, g)
        ctx.stride, ctx.padding = stride, padding
        # read for its shape and layout only
        w = torch.empty(g.shape[1], x.shape[1], k, k, dtype=x.dtype, device=x.device, memory_format=_layout(x))
        s, p = [stride] * 2, [padding] * 2
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(g, x, w, None, s, p, [1, 1], False, [0, 0], 1, mask)[1]

    @staticmethod
    def backward(ctx, gw):
        x, g = ctx.saved_tensors
        s, p, k = ctx.stride, ctx.padding, gw.shape[-1]
        want_x, want_g, *_ = launch.wanted(ctx)
        left_over = [(n + 2 * p - k) % s for n in x.shape[2:]]
        gx = _Convolution.apply(g, gw, s, p, True, left_over) if want_x else None
        gg = _Convolution.apply(x, gw, s, p, False, [0, 0]) if want_g else None
        return gx, gg, None, None, None


def _aten_convolution(x, w, stride, padding, transposed, output_padding):
    s, p = [stride] * 2, [padding] * 2
    return torch.ops.aten.convolution(x, w, None, s, p, [1, 1], transposed, output_padding, 1)


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
    x: Tensor, weight: Tensor, *, up: int = 1, down: int = 1, f: Tensor | None = None, blurred: bool = False
) -> Tensor:
    """Convolution that keeps the size, doubles it (up=2) or halves it (down=2); dtype and memory format of x.

    x [N, Cin, H, W]; weight [Cout, Cin, k, k], k odd (1 or 3 when resampling), cast to the dtype of x; f the resampling
    filter, 2-d or 1-d separable, a constant. blurred: x has been through the FIR of a 3×3 down=2 already, with
    `blur_padding`. Differentiable any number of times in x and weight.
    """
    check_conv2d(x, weight, up, down, f)
    k = weight.shape[-1]
    if down == 2 and k == 1:
        x = downsample2d(x, f)
    elif down == 2 and not blurred:
        x = upfirdn2d(x, f, padding=blur_padding(f))
    if up == 2 and k == 3:
        return upfirdn2d(transposed_conv2d(x, weight), f, padding=transposed_padding(f), gain=4)
    if k == 1:
        x = _pointwise(x, weight.to(x.dtype))
    else:
        stride, padding = (2, 0) if down == 2 else (1, k // 2)
        x = _Convolution.apply(x, _like(weight, x), stride, padding, False, [0, 0])
    return upsample2d(x, f) if up == 2 else x


def transposed_conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """What conv2d(up=2) filters with f, `transposed_padding` and gain 4: [N, Cout, 2H + 1, 2W + 1]; weight 3×3."""
    return _Convolution.apply(x, _like(weight.transpose(0, 1), x), 2, 0, True, [0, 0])


def transposed_padding(f: Tensor) -> tuple[int, int, int, int]:
    """Of the FIR behind `transposed_conv2d`: (1, 1, 1, 1) for 4 taps."""
    return _sides(f, up_padding, -1, 0)


def blur_padding(f: Tensor) -> tuple[int, int, int, int]:
    """Of the FIR in front of a 3×3 convolution with down=2: (2, 2, 2, 2) for 4 taps."""
    return _sides(f, down_padding, 1, 1)


def _like(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype and layout of x: once here, or else once more in each gradient."""
    return weight.to(x.dtype, memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    is_nhwc = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_nhwc else torch.contiguous_format


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """A 1×1 convolution. In channels_last it is a matrix product, up to twice as fast; its gradients are too."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1)).permute(0, 3, 1, 2)
    return _Convolution.apply(x, weight, 1, 0, False, [0, 0])
