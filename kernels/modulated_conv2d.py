"""Modulated convolution (StyleGAN2, arXiv 1912.04958, §2.2).

    per-sample weights    w'[n,o,i,k] = w[o,i,k]·s[n,i];   demod[n,o] = (Σ_{i,k} w'² + 1e-8)^−½
    y = bias_act(w' ⋆ x · demod, …) = bias_act(w ⋆ (x·s), demod=demod, …)

The right-hand form needs no weights per sample: scale the input, one shared convolution, scale the output.
"""

import torch
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail, bias_act_torch
from hsrgan.kernels.conv2d import check_conv2d, conv2d_torch, convolution, geometry_of
from hsrgan.kernels.conv2d_bias_act import layer
from hsrgan.kernels.convolution import tile_of
from hsrgan.kernels.demodulation import EPS, Modulation, modulation, modulation_torch, normalize_for_half


def modulated_conv2d_torch(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    up: int = 1,
    f: Tensor | None = None,
    demodulate: bool = True,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
) -> Tensor:
    """The definition of `modulated_conv2d`."""
    if demodulate and x.dtype == torch.float16:
        weight, style = normalize_for_half(weight, style)
    demod = (style.square() @ weight.square().sum((2, 3)).t() + EPS).rsqrt() if demodulate else None
    x = x * style.to(x.dtype)[:, :, None, None]
    x = conv2d_torch(x, weight, up=up, f=f)
    return bias_act_torch(
        x, bias, demod=demod, noise=noise, strength=strength, act=act, gain=gain, clamp=clamp, next_style=next_style
    )


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    up: int = 1,
    f: Tensor | None = None,
    demodulate: bool = True,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    act: str = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
    next_style: Tensor | None = None,
    ready: Modulation | None = None,
) -> Tensor:
    """bias_act(conv2d(x·style, weight, up, f), bias, demod, noise, …)·next_style: a synthesis layer; dtype and format
    of x.

    x [N, Cin, H, W]; weight [Cout, Cin, k, k]; style [N, Cin]; noise [N or 1, 1, up·H, up·W]; strength one value; bias
    [Cout]; next_style [N, Cout]. Weight and style stay in their own dtype (fp32) for the demodulation and are cast
    where they meet x. fp16 x with demodulation: weight and style are first normalised by their maxima, which
    demodulation undoes. ready: of `prepared`, where x has been multiplied with its style.
    Differentiable in every tensor but f, twice in Triton, any number of times in PyTorch.
    """
    check_conv2d(x, weight, up, 1, f)
    style, demod, pair = _ready(x, weight, style, up, demodulate, ready)
    tail = Tail(bias, demod, noise, strength, act, gain=gain, clamp=clamp, next_style=next_style)
    return layer(x, weight, style, tail, up=up, f=f, pair=pair)


def modulated_convolution(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, ready: Modulation | None = None
) -> tuple[Tensor, Tensor | None]:
    """(c, demod), from which bias_act(c, demod=demod, …) makes modulated_conv2d(x, weight, style, …) at the size of x.

    For an op that does more in the pass of the tail than the tail. Arguments and derivatives as of `modulated_conv2d`.
    """
    check_conv2d(x, weight, 1, 1, None)
    style, demod, pair = _ready(x, weight, style, 1, demodulate, ready)
    return convolution(x, weight, geometry_of(weight, 1, 1), style, pair=pair), demod


def prepared(x: Tensor, weight: Tensor, style: Tensor, size: tuple[int, int], *, up: int = 1) -> Modulation | None:
    """Of a layer that reads what another makes of x, in [N, C, *size]: its modulation, where the other is to multiply
    the style in, as its `next_style`. None: the layer does that for nothing, in its own kernel, or (in plain PyTorch)
    in a pass that costs the same.
    """
    if launch.backend(x) == "torch":
        return None
    like, geometry = x.new_empty(()).expand(len(x), weight.shape[1], *size), geometry_of(weight, up, 1)
    of_its_own = tile_of(like, len(weight), geometry, fused=True) is not None
    return None if of_its_own else modulation(weight, style, x, transposed=geometry.transposed)


def _ready(
    x: Tensor, weight: Tensor, style: Tensor, up: int, demodulate: bool, ready: Modulation | None
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
    """The style that x is to be multiplied with, the demodulation, and the weight as `convolution` takes it."""
    if ready is not None:
        return None, ready.demod, ready[:2]
    launch.check_shape(style, "style", *x.shape[:2])
    launch.check_devices(x, style=style)
    if not demodulate:
        return style, None, None
    transposed = geometry_of(weight, up, 1).transposed
    # 1×1 may become a plain product, which reads the values of what its gradient goes to
    prepare = modulation if weight.shape[-1] > 1 else modulation_torch
    found = prepare(weight, style, x, transposed=transposed)
    return found.style, found.demod, found[:2]
