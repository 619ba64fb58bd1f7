"""The image branch of the skip generator (StyleGAN2, arXiv 1912.04958, figure 7b).

y = upsample(image) + fp32(clamp(w ⋆ (x·s) + bias))        w is 1×1, no demodulation, linear
"""

from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.modulated_conv2d import modulated_conv2d, modulated_conv2d_torch
from hsrgan.kernels.upfirdn2d import check_filter, upsample2d, upsample2d_torch

MAX_OUTPUTS = 4  # channels of an image that the Triton kernels make


def to_rgb_torch(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None = None,
    *,
    clamp: float | None = None,
    image: Tensor | None = None,
    f: Tensor | None = None,
) -> Tensor:
    """The definition of `to_rgb`."""
    y = modulated_conv2d_torch(x, weight, style, demodulate=False, bias=bias, act="linear", clamp=clamp)
    y = y if y.itemsize > 4 else y.float()
    if image is None:
        return y
    return y + (upsample2d_torch(image, f) if image.shape[-1] < y.shape[-1] else image)


def check_to_rgb(
    x: Tensor, weight: Tensor, style: Tensor, image: Tensor | None, f: Tensor | None, prefix: str = "", *,
    bias: Tensor | None, clamp: float | None,
) -> None:  # fmt: skip
    """Raise ValueError for arguments that `to_rgb` does not take. prefix: of the names of bias and clamp."""
    launch.check_images(x)
    launch.check_projection(weight, "weight", x.shape[1])
    launch.check_shape(style, "style", *x.shape[:2])
    launch.check_shape(bias, f"{prefix}bias", weight.shape[0])
    launch.check(clamp is None or clamp > 0, f"{prefix}clamp must be positive; got {clamp}")
    launch.check_devices(x, weight=weight, style=style, image=image, **{f"{prefix}bias": bias})
    if image is not None:
        launch.check_images(image, "image")
        channels = (x.shape[0], weight.shape[0])
        launch.check(image.shape[:2] == channels, f"image must be [N, Cimg] = {channels}; got {list(image.shape[:2])}")
        full, half = x.shape[2:], (x.shape[2] // 2, x.shape[3] // 2)
        fits = image.shape[2:] == full or (image.shape[2:] == half and x.shape[2] % 2 == x.shape[3] % 2 == 0)
        launch.check(fits, f"image must be {full} or {half} pixels; got {list(image.shape)}")
        launch.check(image.shape[2:] == full or f is not None, "f is needed to upsample image")
        if image.shape[2:] != full:
            check_filter(f, x)


def to_rgb(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None = None,
    *,
    clamp: float | None = None,
    image: Tensor | None = None,
    f: Tensor | None = None,
) -> Tensor:
    """Features to pixels, added to the image so far → fp32 image [N, Cimg, H, W] (fp64 for fp64 x).

    x [N, C, H, W]; weight [Cimg, C, 1, 1]; style [N, C], which already carries the weight gain 1/√C; bias [Cimg]; image
    fp32 [N, Cimg, H, W], or half that size, then upsampled with f. Differentiable any number of times in every tensor
    but f.
    """
    check_to_rgb(x, weight, style, image, f, bias=bias, clamp=clamp)
    if launch.backend(x) == "triton" and 1 <= weight.shape[0] <= MAX_OUTPUTS:
        from hsrgan.kernels.to_rgb_triton import to_rgb_triton

        return to_rgb_triton(x, weight, style, bias, clamp, upsampled_for_kernel(image, f, x), f)
    y = modulated_conv2d(x, weight, style, demodulate=False, bias=bias, act="linear", clamp=clamp)
    y = y if y.itemsize > 4 else y.float()
    if image is None:
        return y
    return y + (image if image.shape == y.shape else upsample2d(image, f))


def upsampled_for_kernel(image: Tensor | None, f: Tensor | None, x: Tensor) -> Tensor | None:
    """The image as it is where the kernels can add it to what they make of x: they upsample by 4 separable taps."""
    if image is None or image.shape[2:] == x.shape[2:] or f.shape == (4,):
        return image
    return upsample2d(image, f)
