"""A whole layer: convolution, resampling, and the pointwise tail.

    y = bias_act(conv2d(x), bias)

On the GEMM of `conv_gemm_triton` the tail is its epilogue, wherever it follows the convolution at once and its result
tells the side of the activation: not behind the FIR of up = 2, whose own pass carries the tail.
"""

from torch import Tensor

from hsrgan.kernels.bias_act import Tail, bias_act, bias_act_torch
from hsrgan.kernels.conv2d import (
    after,
    before,
    check_conv2d,
    conv2d_torch,
    convolution,
    geometry_of,
    transposed_padding,
)
from hsrgan.kernels.convolution import Convolution, Geometry, cast, tile_of
from hsrgan.kernels.fir_chain import fir_bias_act


def conv2d_bias_act_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    f: Tensor | None = None,
    act: str = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The definition of `conv2d_bias_act`."""
    x = conv2d_torch(x, weight, up=up, down=down, f=f)
    return bias_act_torch(x, bias, act=act, gain=gain, clamp=clamp, residual=residual)


def conv2d_bias_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: int = 1,
    down: int = 1,
    f: Tensor | None = None,
    blurred: bool = False,
    act: str = "lrelu",
    gain: float | None = None,
    clamp: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """bias_act(conv2d(x, weight, up, down, f, blurred), bias, act, gain, clamp, residual); dtype and format of x.

    x [N, Cin, H, W]; weight [Cout, Cin, k, k]; bias [Cout]; residual of the output's shape; the others as for `conv2d`
    and `bias_act`. Differentiable in every tensor but f, twice in Triton, any number of times in PyTorch.
    """
    check_conv2d(x, weight, up, down, f)
    x = before(x, weight, down, f, blurred)
    tail = Tail(bias, act=act, gain=gain, clamp=clamp, residual=residual)
    return layer(x, weight, None, tail, up=up, down=down, f=f)


def finishes(x: Tensor, weight: Tensor) -> bool:
    """Does the convolution of a layer that keeps its size write y, so that no pass of a tail is left to do more in?"""
    return tile_of(x, len(weight), geometry_of(weight, 1, 1), fused=True) is not None


def layer(
    x: Tensor,
    weight: Tensor,
    style: Tensor | None,
    tail: Tail,
    *,
    up: int = 1,
    down: int = 1,
    f: Tensor | None,
    pair: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """One layer of either network behind the FIR of down = 2, if any: of x·style, with its tail. pair: as for
    `convolution`."""
    geometry = geometry_of(weight, up, down)
    if up == 1 and tail.told_by_y and tile_of(x, len(weight), geometry, fused=True) is not None:
        return _fused(x, pair or (weight, cast(weight, x)), style, tail, geometry)
    x = convolution(x, weight, geometry, style, pair)
    if up == 2 and weight.shape[-1] == 3 and tail.residual is None:
        return fir_bias_act(
            x, f, tail.bias, padding=transposed_padding(f), gain=4, demod=tail.demod, noise=tail.noise,
            strength=tail.strength, act=tail.act, alpha=tail.alpha, act_gain=tail.gain, clamp=tail.clamp,
        )  # fmt: skip
    return bias_act(after(x, weight, up, f), **tail._asdict())


def _fused(
    x: Tensor, pair: tuple[Tensor, Tensor], style: Tensor | None, tail: Tail, geometry: Geometry
) -> Tensor:  # fmt: skip
    """`layer` in one pass over memory, forward."""
    from hsrgan.kernels.bias_act_triton import Finished
    from hsrgan.kernels.pointwise_triton import chain_of

    tail.check(x.new_empty(()).expand(len(x), len(pair[1]), *geometry.size(x)))
    stand_in, y, z = Convolution.apply(x, pair[0], style, pair[1], geometry, tail)
    return Finished.apply(stand_in, y, *tail.operands, tail.residual, z, chain_of(tail, x.dtype))
