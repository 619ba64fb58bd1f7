"""A convolution's weight gradient as an op, and with it the gradients of the scales of a modulated one.

    P[n,o,i,a,b] = Σ_p g[n,o,p]·x[n,i,p·stride + (a, b) − padding]               p: the pixels of g
    weight_gradient:              dw[o,i,a,b] = Σ_n demod[n,o]·style[n,i]·P
    modulated_weight_gradients:   dw; dstyle[n,i] = Σ_{o,a,b} demod·w·P; ddemod[n,o] = Σ_{i,a,b} w·style·P

These are the gradients of Σ g·y for y = demod·(w ⋆ (style·x)), the modulated convolution (modulated_conv2d.py), in one
pass over x and g. Of a transposed convolution, y = demod·(wᵀ stride s of style·x), x and g change places, and their
scales with them:

    weight_gradient(g, x, k, s, padding, x_scale=demod, g_scale=style)                      → dwᵀ [Cin, Cout, k, k]
    modulated_weight_gradients(g, x, w.transpose(0, 1), demod, style, s, padding)           → dwᵀ, ddemod, dstyle

All three results are linear in P, and P in x and in g: every derivative is one of these ops or a convolution again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from hsrgan.kernels import launch
from hsrgan.kernels.convolution import Convolution, Geometry, WeightGradient, cast

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def weight_gradient_torch(
    x: Tensor, g: Tensor, k: int, stride: int = 1, padding: int = 0, *, x_scale: Tensor | None = None,
    g_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The definition of `weight_gradient`."""
    size = [g.shape[1], x.shape[1], k, k]
    return _wide(conv2d_weight(_scaled(x, x_scale), size, _scaled(g, g_scale), stride, padding))


def weight_gradient(
    x: Tensor, g: Tensor, k: int, stride: int = 1, padding: int = 0, *, x_scale: Tensor | None = None,
    g_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Σ over samples and pixels of g_scale·g · x_scale·x, for each of the k×k taps: [Cout, Cin, k, k] in fp32.

    What the convolutions take for their own: the Triton kernel where `conv_wgrad_triton.fits` says so, or
    `conv_table.use_convolution`, else the library's with the scales multiplied in before.

    x [N, Cin, H, W] is what the convolution read, g [N, Cout, h, w], of the dtype of x, the gradient of what it wrote;
    x_scale [N, Cin], g_scale [N, Cout]. k is 1 or 3, stride 1 or 2. fp64 gives fp64. Sums are in fp32 and in a fixed
    order. Differentiable any number of times in all four tensors.
    """
    _check(x, g, k, stride, padding, x_scale, g_scale, "x_scale", "g_scale")
    return WeightGradient.apply(x, g, x_scale, g_scale, Geometry(k, stride, padding), _wide_type(x))


def modulated_weight_gradients_torch(
    x: Tensor, g: Tensor, weight: Tensor, style: Tensor | None, demod: Tensor | None, stride: int = 1,
    padding: int = 0, *, want: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:  # fmt: skip
    """The definition of `modulated_weight_gradients`; the sums over pixels are taken after a convolution."""
    w, k = weight.to(x.dtype), weight.shape[-1]
    dw = dstyle = ddemod = None
    if want[0]:
        dw = weight_gradient_torch(x, g, k, stride, padding, x_scale=style, g_scale=demod)
    if want[1]:
        dstyle = (_wide(x) * _wide(conv2d_input(x.shape, w, _scaled(g, demod), stride, padding))).sum((2, 3))
    if want[2]:
        ddemod = (_wide(g) * _wide(F.conv2d(_scaled(x, style), w, None, stride, padding))).sum((2, 3))
    return dw, dstyle, ddemod


def modulated_weight_gradients(
    x: Tensor, g: Tensor, weight: Tensor, style: Tensor | None, demod: Tensor | None, stride: int = 1,
    padding: int = 0, *, want: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:  # fmt: skip
    """dw [Cout, Cin, k, k], dstyle [N, Cin] and ddemod [N, Cout] in fp32, None where not wanted.

    For callers that hold x and g alone and want all three at once: always the Triton kernel on a GPU, in one pass. The
    trainer's layers do not call it: they have dstyle and ddemod for nothing, out of the pass that makes the gradient of
    x (`conv_gemm_triton`'s sums, or that of bias_act), and want dw alone.

    x [N, Cin, H, W] unscaled; g [N, Cout, h, w] the gradient of what `demod` has scaled, of the dtype of x; weight
    [Cout, Cin, k, k]; style [N, Cin] and demod [N, Cout], None for ones. k, stride, sums and dtypes as in
    `weight_gradient`. Differentiable any number of times in all five tensors.
    """
    k = weight.shape[-1]
    launch.check_images(x)
    launch.check_images(g, "g")
    launch.check_shape(weight, "weight", g.shape[1], x.shape[1], k, k)
    _check(x, g, k, stride, padding, style, demod, "style", "demod")
    return _Gradients.apply(x, g, weight, style, demod, k, stride, padding, want)


def _check(x, g, k, stride, padding, x_scale, g_scale, x_name, g_name) -> None:
    launch.check_images(x)
    launch.check_images(g, "g")
    launch.check(k in (1, 3), f"k must be 1 or 3; got {k}")
    launch.check(stride in (1, 2), f"stride must be 1 or 2; got {stride}")
    launch.check(padding in (0, 1), f"padding must be 0 or 1; got {padding}")
    launch.check(g.dtype == x.dtype, f"g must be {x.dtype} as x is; got {g.dtype}")
    size = [(s + 2 * padding - k) // stride + 1 for s in x.shape[2:]]
    launch.check_shape(g, "g", len(x), g.shape[1], *size)
    launch.check_shape(x_scale, x_name, *x.shape[:2])
    launch.check_shape(g_scale, g_name, *g.shape[:2])


class _Gradients(torch.autograd.Function):
    """x, g, w, xs, gs → dw, dxs, dgs as far as wanted; the scales may be None.

    With upstream gradients A, b, c the scalar to differentiate is Σ P·(A·gs·xs + w·(gs·b + c·xs)).
    """

    @staticmethod
    def forward(ctx, x, g, w, xs, gs, k, stride, padding, want):
        ctx.save_for_backward(x, g, w, xs, gs)
        ctx.how = k, stride, padding
        ctx.set_materialize_grads(False)
        if launch.backend(x) == "triton":
            from hsrgan.kernels.conv_wgrad_triton import gradients

            return tuple(gradients(x, g, w, xs, gs, k, stride, padding, want))
        return modulated_weight_gradients_torch(x, g, w, xs, gs, stride, padding, want=want)

    @staticmethod
    def backward(ctx, A, b, c):
        x, g, w, xs, gs = ctx.saved_tensors
        k, stride, padding = ctx.how
        want_x, want_g, want_w, want_xs, want_gs, *_ = launch.wanted(ctx)
        gx = gg = gw = None

        def convolve(t, weight, transposed):
            """t ⋆ weight at the size of g, or its transpose at the size of x."""
            return None if t is None or weight is None else _convolve(t, weight, x, k, stride, padding, transposed)

        def again(weight, one, other, *want):
            return _Gradients.apply(x, g, weight, one, other, k, stride, padding, want)

        if want_x:
            by_xs = _sum(convolve(_scaled(g, gs), A, True), convolve(_times(g, c), w, True))
            gx = _sum(_scaled(by_xs, xs), _scaled(convolve(_scaled(g, gs), w, True), b) if b is not None else None)
        if want_g:
            by_gs = _sum(convolve(_scaled(x, xs), A, False), convolve(_times(x, b), w, False))
            gg = _sum(_scaled(by_gs, gs), _scaled(convolve(_scaled(x, xs), w, False), c) if c is not None else None)
        if want_w:
            pairs = [] if b is None else [(b, gs)]
            pairs += [] if c is None else [(xs, c)]
            geometry = Geometry(k, stride, padding)
            gw = _sum(*(WeightGradient.apply(x, g, *scales, geometry, w.dtype) for scales in pairs))
        gxs, ggs = (None, None)
        if want_xs or want_gs:
            parts = [] if A is None else [again(A, xs, gs, False, want_xs, want_gs)[1:]]
            if (want_xs and c is not None) or (want_gs and b is not None):
                parts.append(again(w, b, c, False, want_xs and c is not None, want_gs and b is not None)[1:])
            gxs, ggs = (_sum(*same) for same in zip(*parts, strict=True)) if parts else (None, None)
        like = ((gw, w), (gxs, xs), (ggs, gs))
        return gx, gg, *(None if t is None else t.to(of.dtype) for t, of in like), None, None, None, None


def _convolve(t, weight, x, k, stride, padding, transposed):
    geometry = Geometry(k, stride, padding)
    return Convolution.apply(t, weight, None, cast(weight, x), geometry.adjoint(x) if transposed else geometry)


def _wide_type(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _wide(t: Tensor) -> Tensor:
    return t.to(_wide_type(t))


def _scaled(t: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """t [N, C, H, W] times scale [N, C], in the dtype of t; no scale: t itself."""
    return t if t is None or scale is None else t * scale.to(t.dtype)[:, :, None, None]


def _times(t: Tensor, scale: Tensor | None) -> Tensor | None:
    """t times scale; no scale: nothing."""
    return None if scale is None else _scaled(t, scale)


def _sum(*terms: Tensor | None) -> Tensor | None:
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None
