"""The end of a block of the skip generator: conv1's pointwise tail and toRGB's projection of its result, in one pass.

    y = bias_act(x)        rgb = to_rgb(y)        styled = y·next_style

Both read and write the same features: apart they are written once and read once more than together. The next block's
convolution, which may have no kernel of its own to multiply its style in, finds that done. The torch backend runs the
ops one after the other, and so does Triton wherever its kernel does not reach: more than 4 image channels, noise that
wants a gradient.
"""

from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail, bias_act, bias_act_torch, pairs
from hsrgan.kernels.to_rgb import MAX_OUTPUTS, check_to_rgb, to_rgb, to_rgb_torch, upsampled_for_kernel


def bias_act_to_rgb_torch(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None = None,
    rgb_bias: Tensor | None = None,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
    rgb_clamp: float | None = None,
    image: Tensor | None = None,
    f: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The definition of `bias_act_to_rgb`."""
    y = bias_act_torch(
        x, bias, demod=demod, noise=noise, strength=strength, act=act, alpha=alpha, gain=gain, clamp=clamp
    )  # fmt: skip
    both = y, to_rgb_torch(y, weight, style, rgb_bias, clamp=rgb_clamp, image=image, f=f)
    return both if next_style is None else (*both, y * pairs(next_style, y))


def bias_act_to_rgb(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    bias: Tensor | None = None,
    rgb_bias: Tensor | None = None,
    *,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
    rgb_clamp: float | None = None,
    image: Tensor | None = None,
    f: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """(y, rgb): y = bias_act(x, bias, demod, …), rgb = to_rgb(y, weight, style, rgb_bias, rgb_clamp, image, f). With
    next_style (y, rgb, y·next_style), in one pass still.

    x [N, C, H, W], what the convolution returned; y has its dtype and memory format, rgb [N, Cimg, H, W] is fp32 (fp64
    for fp64 x). weight [Cimg, C, 1, 1], style [N, C], rgb_bias [Cimg], image and f as for `to_rgb`, the others as for
    `bias_act`. Differentiable twice in every tensor but f; a third derivative raises RuntimeError in Triton.
    ValueError names an argument that does not fit.
    """
    launch.check_images(x)
    tail = Tail(bias, demod, noise, strength, act, alpha, gain, clamp, next_style)
    tail.check(x)
    check_to_rgb(x, weight, style, image, f, "rgb_", bias=rgb_bias, clamp=rgb_clamp)
    if launch.backend(x) == "triton" and 1 <= weight.shape[0] <= MAX_OUTPUTS and not launch.wants_gradient(noise):
        from hsrgan.kernels.bias_act_to_rgb_triton import bias_act_to_rgb_triton

        image = upsampled_for_kernel(image, f, x)
        return bias_act_to_rgb_triton(x, weight, style, tail, rgb_bias, rgb_clamp, image, f)
    y = bias_act(x, **tail._replace(next_style=None)._asdict())
    both = y, to_rgb(y, weight, style, rgb_bias, clamp=rgb_clamp, image=image, f=f)
    return both if next_style is None else (*both, bias_act(y, demod=next_style, act="linear"))
