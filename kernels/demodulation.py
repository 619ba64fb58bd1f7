"""What G does to a layer's weight and style before its convolution: demodulation, and a cast.

    fp16 activations:  ŵ[o] = w[o] / (max|w[o]|·√(I·k²))    ŝ[n] = style[n] / max|style[n]|       else ŵ = w, ŝ = style
    demod[n,o] = (Σ_{i,k} (ŵ·ŝ)² + 1e-8)^−½                (StyleGAN2, arXiv 1912.04958, equation 3)
    cast = ŵ in the dtype and format of the activations

Seventeen layers of a 1024² generator have all of it, small: on a GPU launches are what it costs.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import launch
from hsrgan.kernels.convolution import cast, layout

EPS = 1e-8


class Modulation(NamedTuple):
    """graph: stands for ŵ in autograd: what comes as its gradient flows to the weight. Its values are not to be read:
    in Triton they are the weight's. [O, I, k, k] like cast, or, transposed, both [I, O, k, k]."""

    graph: Tensor
    cast: Tensor
    style: Tensor  # ŝ [N, I]
    demod: Tensor  # [N, O]


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


def modulation_torch(
    weight: Tensor, style: Tensor, x: Tensor, *, transposed: bool = False, normalise: bool | None = None
) -> Modulation:
    """The definition of `modulation`. Its graph is ŵ itself."""
    if x.dtype == torch.float16 if normalise is None else normalise:
        weight, style = normalize_for_half(weight, style)
    demod = demodulation(weight, style)
    weight = weight.transpose(0, 1) if transposed else weight
    return Modulation(weight, cast(weight, x), style, demod)


def modulation(
    weight: Tensor, style: Tensor, x: Tensor, *, transposed: bool = False, normalise: bool | None = None
) -> Modulation:
    """Weight [O, I, k, k] and style [N, I], fp32, made ready for a convolution of x, in its dtype and memory format.

    Of x only dtype, format and device count. transposed: for a transposed convolution, which takes [I, O, k, k].
    normalise: by the maxima, which count as constants; unless said, for fp16 x. cast has no graph; graph, style and
    demod are differentiable in weight and style, twice in Triton, any number of times in PyTorch.
    """
    launch.check(weight.ndim == 4, f"weight must be [O, I, k, k]; got {list(weight.shape)}")
    launch.check(style.ndim == 2, f"style must be [N, I]; got {list(style.shape)}")
    launch.check_shape(weight, "weight", len(weight), style.shape[1], weight.shape[3], weight.shape[3])
    launch.check_devices(x, weight=weight, style=style)
    if launch.backend(x) == "torch":
        return modulation_torch(weight, style, x, transposed=transposed, normalise=normalise)
    from hsrgan.kernels.demodulation_triton import modulation_triton

    normalise = x.dtype == torch.float16 if normalise is None else normalise
    ready = modulation_triton(weight, style, x.dtype, layout(x), normalise=normalise, transposed=transposed)
    return Modulation(*ready)
