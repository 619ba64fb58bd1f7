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
) -> Tensor:
    """The definition of `modulated_conv2d`."""
    if demodulate and x.dtype == torch.float16:
        weight, style = normalize_for_half(weight, style)
    demod = (style.square() @ weight.square().sum((2, 3)).t() + EPS).rsqrt() if demodulate else None
    x = x * style.to(x.dtype)[:, :, None, None]
    x = conv2d_torch(x, weight, up=up, f=f)
    return bias_act_torch(x, bias, demod=demod, noise=noise, strength=strength, act=act, gain=gain, clamp=clamp)


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
) -> Tensor:
    """bias_act(conv2d(x·style, weight, up, f), bias, demod, noise, …): one synthesis layer; dtype and format of x.

    x [N, Cin, H, W]; weight [Cout, Cin, k, k]; style [N, Cin]; noise [N or 1, 1, up·H, up·W]; strength one value; bias
    [Cout]. Weight and style stay in their own dtype (fp32) for the demodulation and are cast where they meet x. fp16 x
    with demodulation: weight and style are first normalised by their maxima, which demodulation undoes.
    Differentiable in every tensor but f, twice in Triton, any number of times in PyTorch.
    """
    check_conv2d(x, weight, up, 1, f)
    ready = _ready(x, weight, style, up, demodulate)
    style, demod = (style, None) if ready is None else ready[2:]
    tail = Tail(bias, demod, noise, strength, act, gain=gain, clamp=clamp)
    return layer(x, weight, style, tail, up=up, f=f, pair=ready and ready[:2])


def modulated_convolution(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(c, demod), from which bias_act(c, demod=demod, …) makes modulated_conv2d(x, weight, style, …) at the size of x.

    For an op that does more in the pass of the tail than the tail. Arguments and derivatives as of `modulated_conv2d`.
    """
    check_conv2d(x, weight, 1, 1, None)
    ready, geometry = _ready(x, weight, style, 1, demodulate), geometry_of(weight, 1, 1)
    if ready is None:
        return convolution(x, weight, geometry, style), None
    return convolution(x, weight, geometry, ready.style, ready[:2]), ready.demod


def _ready(x: Tensor, weight: Tensor, style: Tensor, up: int, demodulate: bool) -> Modulation | None:
    """Weight and style as they meet x, and the demodulation."""
    launch.check_shape(style, "style", *x.shape[:2])
    launch.check_devices(x, style=style)
    if not demodulate:
        return None
    transposed = geometry_of(weight, up, 1).transposed
    # 1×1 may become a plain product, which reads the values of what its gradient goes to
    prepare = modulation if weight.shape[-1] > 1 else modulation_torch
    return prepare(weight, style, x, transposed=transposed)
