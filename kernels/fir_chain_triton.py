"""bias_act behind a blur and in front of one, in Triton: one pass forward, one for the gradients, one for theirs.

F is the FIR, Fᵀ its transpose (a FIR again), m the slope of act(p)·gain with its clamp, constant where the activation
is piecewise linear; u = 1 where unclamped. Sums are over pixels.

fir_bias_act    y = clamp(act(demod·F(x) + noise·strength + bias)·gain)             saved: y, the next layer's input
    v = m·gy    gx = demod·Fᵀ(v)    P = Σ v    Q = Σ gy·y·u    R = Σ v·noise        one pass over gy and y
    gbias = Σ_n P    gstrength = Σ_nc R    gdemod = Σ v·F(x) = (Q − strength·R − bias·P) / demod
  The last line spares F(x), which was never written: where v is not 0, m·(demod·F(x) + noise·strength + bias) is y.
  It costs no pass and keeps no x, but y is rounded: in half precision gdemod is off by about max(1, |noise·strength +
  bias| / |demod·F(x)|) times what PyTorch's is, close to 1 where demod·F(x) has unit variance, as behind G's layers.
  Of hx, hP, hQ, hR, cotangents of those, with the graph of y going on where y came from:
    ggy = m·(demod·F(hx) + hP + noise·hR) + y·u·hQ    gy' = gy·u·hQ    gdemod' = Σ v·F(hx)      one pass over hx, y, gy

bias_act_fir    y = F(clamp(act(x + bias)·gain))                                    saved: x
    gx = m·Fᵀ(gy)    gbias = Σ gx          one pass over gy and x
    ggy = F(m·hx)                          one pass over hx and x; these two are each other's derivative

In `gx` of fir_bias_act v is made anew for the halo of every tile; the sums count a pixel in the one program whose tile
holds it (`fir4_triton.centre`).

Bytes per pixel and channel of b bytes each: both forward 2b, gradients 3b, bias_act_fir's second derivative 3b,
fir_bias_act's 5b (hx, y, gy read, ggy and y's cotangent written). Unfused 4b, 5b, 5b and more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail
from hsrgan.kernels.bias_act_triton import times_style
from hsrgan.kernels.fir4_triton import Sides, centre, empty, is_nhwc, launch_fir4
from hsrgan.kernels.pointwise_triton import chain_of


class _Blur(NamedTuple):
    """A FIR that keeps the rate, and the pointwise chain beside it."""

    sides: Sides
    flip: bool
    gain: float
    chain: dict[str, Any]

    @property
    def adjoint(self) -> "_Blur":
        x0, x1, y0, y1 = self.sides
        return self._replace(sides=(3 - x0, 3 - x1, 3 - y0, 3 - y1), flip=not self.flip)

    @property
    def gain_in_filter(self) -> "_Blur":
        """The same with the chain in front: F(clamp(act·gain)) = gain·F(clamp'(act)), a product less at every tap."""
        gain, clamp = self.chain["GAIN"], self.chain["CLAMP"]
        if gain <= 0:
            return self
        chain = self.chain | {"GAIN": 1.0, "CLAMP": None if clamp is None else clamp / gain}
        return self._replace(gain=self.gain * gain, chain=chain)

    def run(self, x: Tensor, f: Tensor, nhwc: bool, **options) -> tuple[Tensor, list[Tensor]]:
        """The output, channels_last if nhwc, and the sums asked for."""
        n, c, h, w = x.shape
        x0, x1, y0, y1 = self.sides
        y = empty(x, n, c, h + y0 + y1 - 3, w + x0 + x1 - 3, nhwc=nhwc)
        if options.pop("y2", False):
            options["y2"] = torch.empty_like(y)
        sums = launch_fir4(
            x, f, y, sides=self.sides, flip=self.flip, gain=self.gain, chain=self.chain, **options
        )  # fmt: skip
        return y, [options["y2"], *sums] if "y2" in options else sums


def gradient_fits(sides: Sides) -> bool:
    """Can one pass take the gradient of fir_bias_act and its sums? Not if the FIR pads by more than 3 or crops."""
    return centre(tuple(3 - side for side in sides)) >= 0


def fir_bias_act_triton(x: Tensor, f: Tensor, tail: Tail, sides: Sides, flip: bool, gain: float) -> Tensor:
    """`fir_bias_act` at rate 1 of checked arguments. Differentiable twice in x, bias, demod, strength, next_style."""
    blur = _Blur(sides, flip, float(gain), chain_of(tail, x.dtype))
    found = _FirBiasAct.apply(x, f, *tail.operands, tail.next_style, blur)
    return found if tail.next_style is None else found[0]


class _FirBiasAct(Function):
    """→ y, or with a style y·style and y, which nobody else is to use: second derivatives come back through it."""

    @staticmethod
    def forward(ctx, x, f, bias, demod, noise, strength, style, blur):
        y, styled = blur.run(
            x, f, is_nhwc(x), back="activate", bias=bias, demod=demod, noise=noise, strength=strength, style=style,
            y2=style is not None,
        )  # fmt: skip
        ctx.save_for_backward(y, f, bias, demod, noise, strength, style)
        ctx.blur, ctx.nhwc = blur, is_nhwc(x)
        ctx.set_materialize_grads(False)
        return y if style is None else (*styled, y)

    @staticmethod
    def backward(ctx, g, gy=None):
        y, f, bias, demod, noise, strength, style = ctx.saved_tensors
        want_x, _, want_bias, want_demod, _, want_strength, want_style, _ = launch.wanted(ctx)
        gstyle, by = None, style  # by: what g is still to be multiplied with
        if gy is not None:  # the outer pass of a penalty: two gradients come together
            if g is not None:
                g, gstyle = times_style(g, y, style)
            g, by, want_style = gy if g is None else g + gy, None, False
        if g is None:
            return (None,) * 8
        sums = {
            "v": want_bias or (want_demod and bias is not None),
            "product": want_demod or (want_style and ctx.blur.chain["CLAMP"] is None),
            "noise": want_strength or (want_demod and noise is not None),
            "style": want_style and ctx.blur.chain["CLAMP"] is not None,
        }
        sums = tuple(name for name, wanted in sums.items() if wanted)
        scale = demod if by is None else by if demod is None else demod * by
        gx, *totals = _Gradient.apply(g, y, f, scale, noise, ctx.blur, ctx.nhwc, sums)
        total = dict(zip(sums, totals, strict=True))
        if want_style:
            gstyle = total["style" if "style" in total else "product"]
        total.pop("style", None)
        if by is not None and total:  # a style, constant over pixels, may meet the sums after them
            total = dict(zip(total, torch._foreach_mul([*total.values()], [by] * len(total)), strict=True))
        gbias = gdemod = gstrength = None
        if want_bias:
            gbias = total["v"].sum(0).to(bias.dtype)
        if want_strength:
            gstrength = total["noise"].sum().to(strength.dtype).reshape(strength.shape)
        if want_demod:
            gdemod = total["product"]
            if bias is not None:
                gdemod = torch.addcmul(gdemod, total["v"], bias, value=-1)
            if strength is not None:
                gdemod = torch.addcmul(gdemod, total["noise"], strength, value=-1)
            elif noise is not None:
                gdemod = gdemod - total["noise"]
            gdemod = (gdemod / demod).to(demod.dtype)
        gstyle = None if gstyle is None else gstyle.to(style.dtype)
        return gx if want_x else None, None, gbias, gdemod, None, gstrength, gstyle, None


class _Gradient(Function):
    """g, y → gx and the sums asked for, [N, C] each."""

    @staticmethod
    def forward(ctx, gy, y, f, scale, noise, blur, nhwc, sums):
        gx, totals = blur.adjoint.run(
            gy, f, nhwc, front="slope", source=y, demod=scale, noise=noise if "noise" in sums else None, sums=sums
        )
        ctx.save_for_backward(gy, y, f, scale, noise)
        ctx.blur, ctx.sums = blur, sums
        ctx.set_materialize_grads(False)
        return gx, *totals

    @staticmethod
    def backward(ctx, hx, *given):
        if hx is None and all(h is None for h in given):
            return (None,) * 8
        want_gy, want_y, _, want_scale, *_ = launch.wanted(ctx)
        h = dict(zip(ctx.sums, given, strict=True))
        want_y = want_y and (h.get("product") is not None or h.get("style") is not None)
        ggy, gy2, gscale = _Tangent.apply(
            *ctx.saved_tensors, hx, h.get("v"), h.get("noise"), h.get("product"), h.get("style"), ctx.blur, want_y,
            want_scale,
        )  # fmt: skip
        return ggy if want_gy else None, gy2, None, gscale, *(None,) * 4


class _Tangent(Function):
    """What `_Gradient` takes, and the cotangents of what it gives → the gradients of g, y, scale."""

    @staticmethod
    def forward(ctx, gy, y, f, scale, noise, hx, h_v, h_noise, h_product, h_style, blur, want_y, want_scale):
        if hx is None:
            n, c, height, width = y.shape
            x0, x1, y0, y1 = blur.sides
            hx = y.new_zeros(()).expand(n, c, height + 3 - y0 - y1, width + 3 - x0 - x1)
        ggy, rest = blur.run(
            hx, f, is_nhwc(y), back="tangent", source=y, other=gy, y2=want_y, demod=scale,
            noise=None if h_noise is None else noise, add=h_v, noise_add=h_noise, source_add=h_product, style=h_style,
            sums=("back",) if want_scale else (),
        )  # fmt: skip
        return ggy, rest.pop(0) if want_y else None, rest[0].to(scale.dtype) if want_scale else None

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("fir_bias_act has two derivatives in Triton; a third needs HSRGAN_BACKEND=torch")


def bias_act_fir_triton(x: Tensor, f: Tensor, tail: Tail, sides: Sides, flip: bool, gain: float) -> Tensor:
    """`bias_act_fir` at rate 1 of checked arguments. Differentiable any number of times in x and bias."""
    blur = _Blur(sides, flip, float(gain), chain_of(tail, x.dtype))
    return _BiasActFir.apply(x, f, tail.bias, blur)


class _BiasActFir(Function):
    @staticmethod
    def forward(ctx, x, f, bias, blur):
        ctx.save_for_backward(x, f, bias)
        ctx.blur = blur
        return blur.gain_in_filter.run(x, f, is_nhwc(x), front="activate", bias=bias)[0]

    @staticmethod
    def backward(ctx, gy):
        x, f, bias = ctx.saved_tensors
        want_x, _, want_bias, _ = launch.wanted(ctx)
        gx, *total = _FirSlope.apply(gy, x, f, bias, ctx.blur.adjoint, want_bias)
        gbias = total[0].sum(0).to(bias.dtype) if want_bias else None
        return gx if want_x else None, None, gbias, None


class _FirSlope(Function):
    """t → m·blur(t), and its sums over pixels [N, C] if asked for; m from x and bias, of which it is no function."""

    @staticmethod
    def forward(ctx, t, x, f, bias, blur, want_sum):
        ctx.save_for_backward(x, f, bias)
        ctx.blur, ctx.nhwc = blur, is_nhwc(t)
        ctx.set_materialize_grads(False)
        y, totals = blur.run(
            t, f, is_nhwc(x), back="slope", of_y=False, source=x, bias=bias, sums=("back",) if want_sum else ()
        )
        return y, *totals

    @staticmethod
    def backward(ctx, h, *h_sum):
        x, f, bias = ctx.saved_tensors
        if h_sum and h_sum[0] is not None:
            each = h_sum[0].to(x.dtype)[:, :, None, None]
            h = each.expand(x.shape) if h is None else h + each
        gt = None if h is None else _SlopeFir.apply(h, x, f, bias, ctx.blur.adjoint, ctx.nhwc)
        return gt, None, None, None, None, None


class _SlopeFir(Function):
    """t → blur(m·t), the transpose of `_FirSlope`."""

    @staticmethod
    def forward(ctx, t, x, f, bias, blur, nhwc):
        ctx.save_for_backward(x, f, bias)
        ctx.blur = blur
        return blur.run(t, f, nhwc, front="slope", of_y=False, source=x, bias=bias)[0]

    @staticmethod
    def backward(ctx, h):
        x, f, bias = ctx.saved_tensors
        return _FirSlope.apply(h, x, f, bias, ctx.blur.adjoint, False)[0], None, None, None, None, None
