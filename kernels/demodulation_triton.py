"""A modulated layer's weight and style in Triton: one launch forward, two for all gradients, two for theirs.

With fp16 activations m = max|w[o]|·√(I·k²), s = max|style[n]|, both constants; else 1:

    ŵ = w/m     ŝ = style/s     E[o,i] = Σ_k ŵ²     d[n,o] = (Σ_i ŝ²·E + 1e-8)^−½

First derivative, from the gradients gŵ, gŝ, gd and gE, with u[n,o] = −gd·d³:

    gstyle = (gŝ + ŝ·(u@E)) / s                 gweight = (gŵ + ŵ·(Σ_n u·ŝ² + 2·gE)) / m

Second: cotangents hs and hw of those two, ĥs = hs/s, ĥw = hw/m. With K[o,i] = Σ_k ĥw·ŵ and t[n,o] = Σ_i ŝ·ĥs·E + ŝ²·K

    for gŝ: ĥs      for gŵ: ĥw      for gE: 2K      for gd: −d³·t      for d: −3·gd·d²·t
    for E: Σ_n u·ŝ·ĥs      for ŝ: ĥs·(u@E) + ŝ·(u@2K)      for the weight: ĥw·(Σ_n u·ŝ² + 2·gE) / m

E is a result, too, of which nobody else knows: so autograd adds up what comes for d, E and ŝ and brings it to the first
derivative again. Path length wants the style's gradient alone differentiated: its hw is absent, and with it K and what
only K needs.

Each of the sums is taken within one program, in fp32 (fp64 for fp64) and in a fixed order. What has the size of the
weight is read or written once a launch; forward the weight is read again behind its maximum, out of the caches.
"""

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import blocks, launch
from hsrgan.kernels import demodulation_kernels as kernels
from hsrgan.kernels.demodulation import EPS
from hsrgan.kernels.tiles import power_of_two


def modulation_triton(
    weight: Tensor, style: Tensor, dtype: torch.dtype, memory_format: torch.memory_format, *, normalise: bool,
    transposed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(graph, cast, ŝ, d) of checked arguments. Differentiable twice; a third derivative raises RuntimeError."""
    return _Modulation.apply(weight, style, dtype, memory_format, normalise, transposed)[:4]


class _Modulation(Function):
    @staticmethod
    def forward(ctx, weight, style, dtype, memory_format, normalise, transposed):
        walked, style = _walked(weight), style.contiguous()
        (o, i, k, _), n = weight.shape, len(style)
        shape = (i, o, k, k) if transposed else (o, i, k, k)
        cast = torch.empty(shape, dtype=dtype, device=weight.device, memory_format=memory_format)
        d, e = style.new_empty(n, o), weight.new_empty(o, i)
        wmax = smax = s = None
        if normalise:
            wmax, smax, s = weight.new_empty(o), style.new_empty(n), style.new_empty(n, i)
        sizes = _row_sizes("modulate", weight, n, "transposed" if transposed else "straight")
        outward = cast.transpose(0, 1) if transposed else cast
        launch.run(
            kernels.modulate, (-(-o // sizes["BO"]),), walked, style, outward, s, d, e, wmax, smax, n, o, i,
            *_strides(walked), *_strides(outward), EPS=EPS, BLOCKS=-(-i // sizes["BI"]), **sizes,
        )  # fmt: skip
        graph = weight.transpose(0, 1) if transposed else weight.view_as(weight)
        s = style.view_as(style) if s is None else s
        ctx.save_for_backward(weight, s, d, e, wmax, smax)
        ctx.transposed = transposed
        ctx.passes_to = {0: 0, 2: 1}  # for `launch.wanted`: graph is of the weight alone, ŝ of the style
        ctx.set_materialize_grads(False)
        constants = [t for t, needed in zip((graph, s), ctx.needs_input_grad, strict=False) if not needed]
        ctx.mark_non_differentiable(cast, *constants)
        return graph, cast, s, d, e

    @staticmethod
    def backward(ctx, gw, _, gs, gd, ge):
        want_weight, want_style, *_ = launch.wanted(ctx)
        weight, s, d, e, wmax, smax = ctx.saved_tensors
        gw = gw.transpose(0, 1) if gw is not None and ctx.transposed else gw
        if gd is None and ge is None:
            gw = gw if gw is None or wmax is None else gw / wmax[:, None, None, None]
            gs = gs if gs is None or smax is None else gs / smax[:, None]
        else:
            gd = torch.zeros_like(d) if gd is None else gd
            gw, gs = _First.apply(gw, gs, gd, ge, weight, s, d, e, wmax, smax, (want_weight, want_style))
        return gw, gs, None, None, None, None


class _First(Function):
    """gŵ, gŝ, gd, gE, weight, ŝ, d, E, m, s → the gradients of weight and style, as far as wanted."""

    @staticmethod
    def forward(ctx, gw, gs, gd, ge, weight, s, d, e, wmax, smax, want):
        ctx.save_for_backward(gd, ge, weight, s, d, e, wmax, smax)
        ctx.set_materialize_grads(False)
        gw, weight, gs, gd, ge, s = _walked(gw), _walked(weight), *_dense(gs, gd, ge, s)
        n, o, i = len(s), *e.shape
        gweight = gstyle = None
        if want[0]:
            gweight = torch.empty_like(weight)
            sizes = _row_sizes("rows", weight, n)
            grid = (-(-o // sizes["BO"]), -(-i // sizes["BI"]))
            launch.run(
                kernels.rows, grid, gw, ge, gd, d, s, weight, wmax, gweight, n, o, i,
                *_strides(gw), *_strides(weight), *_strides(gweight), **sizes,
            )  # fmt: skip
        if want[1]:
            gstyle = torch.empty_like(s)
            _columns(gs, s, gd, d, e, None, None, smax, gstyle, None)
        return gweight, gstyle

    @staticmethod
    def backward(ctx, hw, hs):
        want = launch.wanted(ctx)
        if hw is None and hs is None:
            return (None,) * 11
        wmax, smax = ctx.saved_tensors[-2:]
        found = list(_Second.apply(hw, hs, *ctx.saved_tensors, want[:8]))
        if want[0] and wmax is None:
            found[0] = hw
        if want[1] and smax is None:
            found[1] = hs
        return *found, None, None, None


class _Second(Function):
    """hw, hs, and what `_First` takes → cotangents of gŵ, gŝ, gd, gE, weight, ŝ, d, E, as far as wanted."""

    @staticmethod
    def forward(ctx, hw, hs, gd, ge, weight, s, d, e, wmax, smax, want):
        hw, weight, hs, gd, ge, s = _walked(hw), _walked(weight), *_dense(hs, gd, ge, s)
        n, o, i = len(s), *e.shape
        by_w, by_s = hw is not None, hs is not None

        def made(wanted: bool, like: Tensor) -> Tensor | None:
            return torch.empty_like(like) if wanted else None

        for_a = made(want[0] and by_w and wmax is not None, weight)
        for_b = made(want[1] and by_s and smax is not None, s)
        for_g, for_ge = made(want[2], d), made((want[3] or want[5]) and by_w, e)  # 2K, which the columns read
        for_w, for_s = made(want[4] and by_w, weight), made(want[5], s)
        for_d, for_e = made(want[6], d), made(want[7] and by_s, e)
        if any(t is not None for t in (for_a, for_g, for_ge, for_w, for_d, for_e)):
            sizes = _row_sizes("second", weight, n)
            launch.run(
                kernels.second_rows, (-(-o // sizes["BO"]),), hw, hs, ge, gd, d, e, s, weight, wmax, smax,
                for_a, for_ge, for_g, for_w, for_d, for_e, n, o, i,
                *_strides(hw), *_strides(weight), *_strides(for_a), *_strides(for_w),
                BLOCKS=-(-i // sizes["BI"]), **sizes,
            )  # fmt: skip
        if for_s is not None or for_b is not None:
            _columns(None, hs, gd, d, e, s if by_w else None, for_ge, smax, for_s, for_b)
        return for_a, for_b, for_g, for_ge if want[3] else None, for_w, for_s, for_d, for_e

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("modulation has two derivatives in Triton; a third needs HSRGAN_BACKEND=torch")


def _row_sizes(kernel: str, weight: Tensor, samples: int, shape: str = "") -> dict[str, object]:
    """The constants that kernels of a program for some outputs have in common."""
    found = blocks.sizes(f"demodulation.{kernel}", weight, shape)
    _, i, k, _ = weight.shape
    return {
        "BO": found.pop("outputs"), "BI": min(power_of_two(i), found.pop("inputs")),
        "BN": min(power_of_two(samples), found.pop("samples")), "K": k, "T": power_of_two(k * k), "ACC": _acc(weight),
        **found,
    }  # fmt: skip


def _columns(add, p, gd, d, e, q, c, smax, out, divided) -> None:
    """What `kernels.columns` says of these."""
    found, (n, o), i = blocks.sizes("demodulation.columns", e), d.shape, e.shape[1]
    bn, bo = min(power_of_two(n), found.pop("samples")), min(power_of_two(o), found.pop("outputs"))
    bi = found.pop("inputs")
    launch.run(
        kernels.columns, (-(-i // bi), -(-n // bn)), add, p, gd, d, e, q, c, smax, out, divided, n, o, i,
        BN=bn, BO=bo, BI=bi, ACC=_acc(e), **found,
    )  # fmt: skip


def _acc(weight: Tensor) -> tl.dtype:
    return tl.float64 if weight.dtype == torch.float64 else tl.float32


def _walked(t: Tensor | None) -> Tensor | None:
    """t [·, ·, k, k] if one stride leads from tap to tap, as in both of PyTorch's formats and any slice of channels."""
    return t if t is None or t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3) else t.contiguous()


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    """Of output, input and tap."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(3))


def _dense(*small: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in small)
