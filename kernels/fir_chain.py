"""The resampling FIR and the pointwise tail of a layer in one pass over memory.

    fir_bias_act(x) = bias_act(upfirdn2d(x))        behind G's up-convolution: FIR, demodulation, noise, bias, lrelu, …
    bias_act_fir(x) = upfirdn2d(bias_act(x))        between D's convolutions: bias, lrelu, clamp, then the blur

The torch backend runs the two ops one after the other, and so does Triton wherever its kernel does not reach: other
filters than 4 separable taps, resampling, smooth activations, a negative gain, noise that wants a gradient.
"""

from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail, bias_act, bias_act_torch
from hsrgan.kernels.upfirdn2d import Pair, check_filter, output_shape, paddings, pair, upfirdn2d, upfirdn2d_torch


def fir_bias_act_torch(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None = None,
    *,
    up: Pair = 1,
    padding: int | tuple[int, ...] | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    act_gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
) -> Tensor:
    """The definition of `fir_bias_act`."""
    x = upfirdn2d_torch(x, f, up=up, padding=padding, flip_filter=flip_filter, gain=gain)
    return bias_act_torch(
        x, bias, demod=demod, noise=noise, strength=strength, act=act, alpha=alpha, gain=act_gain, clamp=clamp,
        next_style=next_style,
    )  # fmt: skip


def bias_act_fir_torch(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None = None,
    *,
    act: str = "lrelu",
    alpha: float | None = None,
    act_gain: float | None = None,
    clamp: float | None = None,
    down: Pair = 1,
    padding: int | tuple[int, ...] | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """The definition of `bias_act_fir`."""
    x = bias_act_torch(x, bias, act=act, alpha=alpha, gain=act_gain, clamp=clamp)
    return upfirdn2d_torch(x, f, down=down, padding=padding, flip_filter=flip_filter, gain=gain)


def fir_bias_act(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None = None,
    *,
    up: Pair = 1,
    padding: int | tuple[int, ...] | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    act: str = "lrelu",
    alpha: float | None = None,
    act_gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
) -> Tensor:
    """bias_act(upfirdn2d(x, f, up, padding, flip_filter, gain), bias, demod, …, gain=act_gain); dtype and format of x.

    x [N, C, H, W]; f as for `upfirdn2d`, a constant; the others as for `bias_act`, noise of the output's size.
    Differentiable twice in every tensor but f. Triton, fused: the gradient of demod divides by demod, which must not be
    zero (a demodulation never is). ValueError names an argument that does not fit.
    """
    launch.check_images(x)
    check_filter(f, x)
    rates, sides = pair(up, "up"), paddings(padding)
    shape = output_shape(x, f, rates, (1, 1), sides)
    like = x[:, :, :1, :1].expand(shape) if x.numel() else x.new_empty(0).as_strided(shape, (0, 0, 0, 0))
    tail = Tail(bias, demod, noise, strength, act, alpha, act_gain, clamp, next_style)
    tail.check(like)
    fits = rates == (1, 1) and not launch.wants_gradient(noise)
    if launch.backend(x) == "triton" and fits and _fusible(f, tail):
        from hsrgan.kernels.fir_chain_triton import fir_bias_act_triton, gradient_fits

        if gradient_fits(sides):
            return fir_bias_act_triton(x, f.detach(), tail, sides, flip_filter, gain)
    x = upfirdn2d(x, f, up=up, padding=padding, flip_filter=flip_filter, gain=gain)
    return bias_act(x, **tail._asdict())


def bias_act_fir(
    x: Tensor,
    f: Tensor | None,
    bias: Tensor | None = None,
    *,
    act: str = "lrelu",
    alpha: float | None = None,
    act_gain: float | None = None,
    clamp: float | None = None,
    down: Pair = 1,
    padding: int | tuple[int, ...] | list[int] = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """upfirdn2d(bias_act(x, bias, act, alpha, act_gain, clamp), f, down, padding, …); dtype and format of x.

    x [N, C, H, W]; bias [C]; f as for `upfirdn2d`, a constant. Differentiable twice in x and bias.
    ValueError names an argument that does not fit.
    """
    launch.check_images(x)
    check_filter(f, x)
    rates, sides = pair(down, "down"), paddings(padding)
    output_shape(x, f, (1, 1), rates, sides)
    tail = Tail(bias, act=act, alpha=alpha, gain=act_gain, clamp=clamp)
    tail.check(x)
    if launch.backend(x) == "triton" and rates == (1, 1) and _fusible(f, tail):
        from hsrgan.kernels.fir_chain_triton import bias_act_fir_triton

        return bias_act_fir_triton(x, f.detach(), tail, sides, flip_filter, gain)
    x = bias_act(x, **tail._asdict())
    return upfirdn2d(x, f, down=down, padding=padding, flip_filter=flip_filter, gain=gain)


def _fusible(f: Tensor | None, tail: Tail) -> bool:
    return f is not None and f.shape == (4,) and tail.told_by_y
