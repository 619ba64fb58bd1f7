"""The convolution primitive and its gradients, each differentiable again, on the library or on the Triton GEMM.

    Convolution     y = w ⋆ (x·s)  or its transpose                s [N, Cin]: the style, or none
    InputGradient   u = the transpose of ⋆ by w, of g;  gx = u·s,  gs = Σ_q u·x
    WeightGradient  gw = Σ_n (g·b) ⋆ (x·a)                         a, b [N, C]: as s, or none

Every derivative of one is made of these three, so that any order holds; gradients that nobody will use are not
computed. Which implementation runs is asked for each of them by `conv_table`, by its own shape.

The weight comes as a pair: the parameter (of a modulated one what stands for it, `demodulation`), to which the gradient
goes in its own precision, and its `cast` in the dtype and layout of the activations, made once and shared by every
pass: forward, gradients, R1's and path length's second derivative. A phase uses a weight once a round, for fakes and
reals together, so that this and fp16's normalisation are once a phase and round (tests/test_precision.py counts).
Nothing is kept from one phase to the next, where some weights are the same still: to cast and normalise FFHQ-1024's 4.9
million half-precision weights once more moves about 0.1 GB, 20 µs of an H200's memory in a step of 84 ms at least
(`python tools/bench_train.py --model ffhq1024`), and a weight that is kept can go stale.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail, pairs
from hsrgan.kernels.conv_table import Shape, Tile, choose, forced
from hsrgan.kernels.tiles import is_nhwc


class Geometry(NamedTuple):
    """Of a convolution with k×k weights [Cout, Cin, k, k] or, transposed, [Cin, Cout, k, k]."""

    k: int
    stride: int = 1
    padding: int = 0
    transposed: bool = False
    left_over: tuple[int, int] = (0, 0)  # transposed: rows and columns that the convolution does not reach

    def size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the result."""
        grow, s = self.k - 2 * self.padding, self.stride
        if self.transposed:
            return tuple((n - 1) * s + grow + more for n, more in zip(x.shape[2:], self.left_over, strict=True))
        return tuple((n - grow) // s + 1 for n in x.shape[2:])

    def adjoint(self, x: Tensor) -> "Geometry":
        """Of the gradient of x."""
        if self.transposed:
            return self._replace(transposed=False, left_over=(0, 0))
        left_over = tuple((n + 2 * self.padding - self.k) % self.stride for n in x.shape[2:])
        return self._replace(transposed=True, left_over=left_over)

    def pair(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What WeightGradient takes, of the input x and the output's gradient g."""
        return (g, x) if self.transposed else (x, g)


def cast(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in the dtype and layout of x, without a graph: the second half of the pair."""
    return weight.detach().to(x.dtype, memory_format=layout(x))


def pair_of(weight: Tensor, gain: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves for gain·weight: scaled and cast in one pass. Nobody reads the first half's values."""
    if gain == 1:
        return weight, cast(weight, x)
    w = torch.empty(weight.shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    return _Gain.apply(weight, gain), torch.mul(weight.detach(), gain, out=w)


class _Gain(Function):
    """Stands for gain·weight in the graph: it has that gradient, and the weight's own values."""

    @staticmethod
    def forward(ctx, weight, gain):
        ctx.gain = gain
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.gain, None


def layout(x: Tensor) -> torch.memory_format:
    is_nhwc = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_nhwc else torch.contiguous_format


def tile_of(x: Tensor, outputs: int, geometry: Geometry, *, fused: bool) -> Tile | None:
    """The GEMM's tile for a convolution of x, or None: the library. fused: with a style, its gradient, or a tail."""
    if launch.backend(x) != "triton":
        return None
    k, stride, _, transposed, _ = geometry
    height = max(x.shape[2], geometry.size(x)[0])
    return choose(Shape.of(k, stride, transposed, x.shape[1], outputs, height, fused), x.dtype, launch.chip(x))


class Convolution(Function):
    """x·scale convolved with the weight. With a `Tail` (GEMM only) three results: a stand-in for the convolution, which
    has a shape and a gradient but no values; and without a gradient y, the tail's result before the residual, and z,
    that with it, or None.

    PyTorch's own second derivative of a convolution turns the batch into channels, many times slower on a CPU.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, w, geometry, tail=None):
        ctx.save_for_backward(x, weight, scale, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        if tail is None:
            return convolve(x, w, geometry, scale)
        from hsrgan.kernels.conv_gemm_triton import launch_gemm

        tile = tile_of(x, w.shape[1 if geometry.transposed else 0], geometry, fused=True)
        y, z = launch_gemm(x, w, geometry.size(x), tile, **_kernel(geometry), scale=scale, tail=tail)
        ctx.mark_non_differentiable(*[t for t in (y, z) if t is not None])
        return torch.zeros((), dtype=y.dtype, device=y.device).expand(y.shape), y, z

    @staticmethod
    def backward(ctx, g, *_):
        if g is None:
            return (None,) * 6
        x, weight, scale, w = ctx.saved_tensors
        geometry, g = ctx.geometry, _in_format_of(x, g)
        want_x, want_weight, want_scale, *_ = launch.wanted(ctx)
        gx = gweight = gscale = None
        if scale is None and want_x:
            gx = Convolution.apply(g, weight, None, w, geometry.adjoint(x))
        elif want_x or want_scale:
            gx, gscale = InputGradient.apply(g, x, weight, scale, w, geometry)
        if want_weight:
            a, b = (None, scale) if geometry.transposed else (scale, None)
            gweight = WeightGradient.apply(*geometry.pair(x, g), a, b, geometry, weight.dtype)
        return gx, gweight, gscale, None, None, None


class InputGradient(Function):
    """g, x, weight, scale → the gradients of x and of scale [N, Cin]."""

    @staticmethod
    def forward(ctx, g, x, weight, scale, w, geometry):
        ctx.save_for_backward(g, x, weight, scale, w)
        ctx.geometry = geometry
        adjoint = geometry.adjoint(x)
        tile = tile_of(g, x.shape[1], adjoint, fused=True)
        if tile is None:
            u = convolve(g, w, adjoint)
            return u * pairs(scale, u), _over_pixels(u, x).to(scale.dtype)
        from hsrgan.kernels.conv_gemm_triton import launch_gemm

        gx, gscale = launch_gemm(
            g, w, adjoint.size(g), tile, **_kernel(adjoint), tail=Tail(demod=scale, act="linear"), ref=x
        )  # fmt: skip
        return gx, gscale.to(scale.dtype)

    @staticmethod
    def backward(ctx, hx, hscale):
        g, x, weight, scale, w = ctx.saved_tensors
        geometry = ctx.geometry
        want_g, want_x, want_weight, want_scale, *_ = launch.wanted(ctx)
        gg = gx = gweight = gscale = None
        if want_g or want_weight:
            direction = _in_format_of(g, hx * pairs(scale, hx) + x * pairs(hscale, x))
        if want_g:
            gg = Convolution.apply(direction, weight, None, w, geometry)
        if want_weight:
            gweight = WeightGradient.apply(*geometry.pair(direction, g), None, None, geometry, weight.dtype)
        if want_x or want_scale:
            gx, gscale = InputGradient.apply(g, hx, weight, hscale.to(scale.dtype), w, geometry)
        return gg, gx, gweight, gscale, None, None


class WeightGradient(Function):
    """x [N, Cin, H, W], g [N, Cout, h, w] and their scales → the weight gradient [Cout, Cin, k, k] of x → g."""

    @staticmethod
    def forward(ctx, x, g, x_scale, g_scale, geometry, dtype):
        ctx.save_for_backward(x, g, x_scale, g_scale)
        k, stride, padding, *_ = geometry
        ctx.geometry = Geometry(k, stride, padding)
        return _weight_gradient(x, g, k, stride, padding, x_scale=x_scale, g_scale=g_scale).to(dtype)

    @staticmethod
    def backward(ctx, hw):
        x, g, x_scale, g_scale = ctx.saved_tensors
        want_x, want_g, want_x_scale, want_g_scale, *_ = launch.wanted(ctx)
        w = cast(hw, x)
        gx = gg = gx_scale = gg_scale = None
        if want_x or want_x_scale:
            u = Convolution.apply(_scaled(g, g_scale), hw, None, w, ctx.geometry.adjoint(x))
            gx = _scaled(u, x_scale)
            gx_scale = _over_pixels(u, x).to(x_scale.dtype) if want_x_scale else None
        if want_g or want_g_scale:
            u = Convolution.apply(_scaled(x, x_scale), hw, None, w, ctx.geometry)
            gg = _scaled(u, g_scale)
            gg_scale = _over_pixels(u, g).to(g_scale.dtype) if want_g_scale else None
        return gx, gg, gx_scale, gg_scale, None, None


def convolve(x: Tensor, w: Tensor, geometry: Geometry, scale: Tensor | None = None) -> Tensor:
    """w ⋆ (x·scale) by the implementation that the table names. No graph."""
    tile = tile_of(x, w.shape[1 if geometry.transposed else 0], geometry, fused=scale is not None)
    if tile is not None:
        from hsrgan.kernels.conv_gemm_triton import launch_gemm

        return launch_gemm(x, w, geometry.size(x), tile, **_kernel(geometry), scale=scale)[0]
    _, s, p, transposed, left_over = geometry
    x = _scaled(x, scale)
    with _as_ours():
        y = torch.ops.aten.convolution(x, w, None, [s] * 2, [p] * 2, [1, 1], transposed, left_over, 1)
    # a GPU's library keeps channels_last; without a device PyTorch forgets it, and a recording would show other kernels
    return torch.empty_like(y, memory_format=torch.channels_last) if y.is_meta and is_nhwc(x) else y


def _weight_gradient(
    x: Tensor, g: Tensor, k: int, stride: int, padding: int, *, x_scale: Tensor | None, g_scale: Tensor | None
) -> Tensor:
    """Σ_n Σ_p g[n,o,p]·g_scale[n,o]·x[n,i,p·stride + tap − padding]·x_scale[n,i]."""
    if launch.backend(x) == "triton" and k in (1, 3):
        from hsrgan.kernels.conv_wgrad_triton import fits, gradients

        scaled = x_scale is not None or g_scale is not None
        if forced() == "gemm" or (forced() is None and fits(x, g, k, stride, scaled=scaled)):
            return gradients(x, g, None, x_scale, g_scale, k, stride, padding, (True, False, False))[0]
    x, g = _scaled(x, x_scale), _scaled(g, g_scale)
    # read for its shape and layout only
    w = torch.empty(g.shape[1], x.shape[1], k, k, dtype=x.dtype, device=x.device, memory_format=layout(x))
    s, p = [stride] * 2, [padding] * 2
    mask = [False, True, False]
    with _as_ours():
        return torch.ops.aten.convolution_backward(g, x, w, None, s, p, [1, 1], False, [0, 0], 1, mask)[1]


@contextmanager
def _as_ours() -> Iterator[None]:
    """Inside cuDNN and MIOpen add up in one order, for which they may otherwise choose an implementation with atomics,
    and take tf32 where `launch.allow_tf32` says so: PyTorch's own default is to take it.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32 = True, launch.tf32_allowed()
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.allow_tf32 = before


def _kernel(geometry: Geometry) -> dict[str, object]:
    """What `launch_gemm` is told of it."""
    return {"stride": geometry.stride, "padding": geometry.padding, "transposed": geometry.transposed}


def _over_pixels(a: Tensor, b: Tensor) -> Tensor:
    """Σ_q a·b [N, C] in fp32 (fp64 for fp64): neither a product nor a sum of half precision is rounded or overflows."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum((2, 3))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * pairs(scale, x)


def _in_format_of(x: Tensor, g: Tensor) -> Tensor:
    """g in the memory format of x: a mixed pair would be reordered in every call of the library."""
    if is_nhwc(g) == is_nhwc(x):
        return g
    return g.contiguous(memory_format=torch.channels_last if is_nhwc(x) else torch.contiguous_format)
