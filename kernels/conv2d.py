"""Convolution with StyleGAN2's resampling.

    up = down = 1     y = w ⋆ x                                       "same" zero padding
    up = 2, 3×3       y = 4·f ∗ (wᵀ stride 2 of x), FIR pad [1, 1]    transposed convolution, then the FIR
    up = 2, 1×1       y = upsample(w ⋆ x)
    down = 2, 3×3     y = (w stride 2) ⋆ (f ∗ x), FIR pad [2, 2]
    down = 2, 1×1     y = w ⋆ downsample(x)

⋆ is PyTorch's convolution (a correlation with the stored weight); paddings are those of a 4-tap f.
"""

import torch.nn.functional as F
from hsrgan.kernels import launch
from hsrgan.kernels.upfirdn2d import (
    down_padding,
    downsample2d_torch,
    up_padding,
    upfirdn2d_torch,
    upsample2d_torch,
)
from torch import Tensor


def conv2d_torch(x: Tensor, weight: Tensor, *, up: int = 1, down: int = 1, f: Tensor | None = None) -> Tensor:
    """The definition of `conv2d`."""
    k = weight.shape[-1]
    weight = weight.to(x.dtype)
    if up == 1 and down == 1:
        return F.conv2d(x, weight, padding=k // 2)
    if k == 1:
        return upsample2d_torch(F.conv2d(x, weight), f) if up == 2 else F.conv2d(downsample2d_torch(x, f), weight)
    taps = f.shape[-1]
    if up == 2:
        before, after = up_padding(taps)
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        return upfirdn2d_torch(x, f, padding=(before - 1, after, before - 1, after), gain=4)
    before, after = down_padding(taps)
    x = upfirdn2d_torch(x, f, padding=(before + 1, after + 1, before + 1, after + 1))
    return F.conv2d(x, weight, stride=2)


def check_conv2d(x: Tensor, weight: Tensor, up: int, down: int, f: Tensor | None) -> None:
    """Raise ValueError for arguments that `conv2d` does not take."""
    launch.check_images(x)
    k = weight.shape[-1]
    if weight.ndim != 4 or weight.shape[1] != x.shape[1] or weight.shape[2] != k or k % 2 == 0:
        raise ValueError(f"weight must be [Cout, {x.shape[1]}, k, k] with odd k; got {list(weight.shape)}")
    if (up, down) != (1, 1):
        launch.check((up, down) in ((2, 1), (1, 2)), f"up and down are 1, or one of them 2; got up={up}, down={down}")
        launch.check(k in (1, 3), f"resampling takes 1×1 and 3×3 weights; got {k}×{k}")
        launch.check(f is not None and f.ndim in (1, 2), "f, a 1-d or 2-d filter, is needed to resample")


def conv2d(x: Tensor, weight: Tensor, *, up: int = 1, down: int = 1, f: Tensor | None = None) -> Tensor:
    """Convolution that keeps the size, doubles it (up=2) or halves it (down=2); dtype and memory format of x.

    x [N, Cin, H, W]; weight [Cout, Cin, k, k], k odd (1 or 3 when resampling), cast to the dtype of x; f the resampling
    filter, 2-d or 1-d separable, a constant. Differentiable any number of times in x and weight.
    """
    check_conv2d(x, weight, up, down, f)
    launch.backend()
    return conv2d_torch(x, weight, up=up, down=down, f=f)
