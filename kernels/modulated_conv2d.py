"""Modulated convolution (StyleGAN2, arXiv 1912.04958, §2.2).

    per-sample weights    w'[n,o,i,k] = w[o,i,k]·s[n,i];   demod[n,o] = (Σ_{i,k} w'² + 1e-8)^−½
    y = bias_act(w' ⋆ x · demod, …) = bias_act(w ⋆ (x·s), demod=demod, …)

The right-hand form needs no weights per sample: scale the input, one shared convolution, scale the output.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail, bias_act_torch
from hsrgan.kernels.conv2d import check_conv2d, conv2d_torch, convolution, geometry_of
from hsrgan.kernels.conv2d_bias_act import layer

EPS = 1e-8


class _Demodulation(Function):
    """weight, style → demodulation. Its backward is what autograd would make of the definition, in half as many small
    launches: every layer of G has one, and a GPU takes as long for it as for a thousand times the work. Made of
    PyTorch's ops, so any order holds.
    """

    @staticmethod
    def forward(ctx, weight, style):
        energy = weight.square().sum((2, 3))
        demod = (style.square() @ energy.t() + EPS).rsqrt()
        ctx.save_for_backward(weight, style, energy, demod)
        return demod

    @staticmethod
    def backward(ctx, g):
        weight, style, energy, demod = ctx.saved_tensors
        gweight = gstyle = None
        u = -g * demod**3  # d demod = −demod³ · (Σ w²·s·ds + Σ s²·w·dw)
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():  # energy has no graph of its own
                energy = weight.square().sum((2, 3))
            gstyle = (u @ energy) * style
        if ctx.needs_input_grad[0]:
            gweight = (u.t() @ style.square())[:, :, None, None] * weight
        return gweight, gstyle


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """rsqrt(Σ_{i,k} (w[o,i,k]·s[n,i])² + 1e-8) → [N, Cout]: the sum over the kernel first, then one small product."""
    return _Demodulation.apply(weight, style)


def normalize_for_half(weight: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and style brought below 1 in magnitude, which demodulation undoes: fp16 then cannot overflow.

    The maxima count as constants: what is undone has no gradient (but that of the 1e-8, which fp32 rounds away).
    """
    fan_in = weight[0].numel()
    weight = weight / (weight.detach().abs().amax((1, 2, 3), keepdim=True) * fan_in**0.5)
    return weight, style / style.detach().abs().amax(1, keepdim=True)


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
    weight, style, demod = _normalized(x, weight, style, demodulate)
    tail = Tail(bias, demod, noise, strength, act, gain=gain, clamp=clamp)
    return layer(x, weight, style, tail, up=up, f=f)


def modulated_convolution(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True
) -> tuple[Tensor, Tensor | None]:
    """(c, demod), from which bias_act(c, demod=demod, …) makes modulated_conv2d(x, weight, style, …) at the size of x.

    For an op that does more in the pass of the tail than the tail. Arguments and derivatives as of `modulated_conv2d`.
    """
    check_conv2d(x, weight, 1, 1, None)
    weight, style, demod = _normalized(x, weight, style, demodulate)
    return convolution(x, weight, geometry_of(weight, 1, 1), style), demod


def _normalized(x: Tensor, weight: Tensor, style: Tensor, demodulate: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weight and style as they meet x, and the demodulation."""
    launch.check_shape(style, "style", *x.shape[:2])
    launch.check_devices(x, style=style)
    if demodulate and x.dtype == torch.float16:
        weight, style = normalize_for_half(weight, style)
    return weight, style, demodulation(weight, style) if demodulate else None
