"""`packed_styles` in Triton: three products, each of which is a derivative of the other two.

    y[n, r]  = a(r)·(Σ_k W[r, k]·x[n, l(r), k] + b[r])     r: a row, l(r) the w of its layer, a(r) its gain
    gx[n, l, k] = Σ_{r: l(r) = l} a(r)·g[n, r]·W[r, k]
    gW[r, k] = Σ_n a(r)·g[n, r]·x[n, l(r), k]              gb[r] = Σ_n a(r)·g[n, r]

A program has a block of rows of one layer; which layer it finds in constants, for a network has one set of them. y and
g hold the layers' [N, C] one behind another, each dense. Sums in fp32 (fp64 for fp64), in a fixed order.
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import blocks, launch
from hsrgan.kernels.products import products


class Layers(NamedTuple):
    """Rows of each layer, the w that it reads, and its gain."""

    sizes: tuple[int, ...]
    which: tuple[int, ...]
    gains: tuple[float, ...]

    def constants(self, x: Tensor) -> dict[str, Any]:
        """LAYERS: (first row, last + 1, first block, last + 1, w, gain) of each."""
        sizes = blocks.sizes("styles", x, "*")
        rows = accumulate(self.sizes, initial=0)
        counts = list(accumulate((-(-size // sizes["ROWS"]) for size in self.sizes), initial=0))
        layers = zip(pairwise(rows), pairwise(counts), self.which, self.gains, strict=True)
        every = tuple((*rows, *where, which, gain) for rows, where, which, gain in layers)
        return sizes | products(x) | {"LAYERS": every, "COUNT": len(every), "ALL_BLOCKS": counts[-1]}


@triton.jit
def _layer(block, samples, LAYERS: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr):
    """Of a block: its rows, whether they exist, its w and gain, where y[0, row] lies, and how far y[1, row] is from it.
    """
    start, stop, first, which = block * 0, block * 0, block * 0, block * 0
    gain = tl.zeros([1], ACC)
    for i in tl.static_range(COUNT):
        here = block >= LAYERS[i][2]
        start = tl.where(here, LAYERS[i][0], start)
        stop = tl.where(here, LAYERS[i][1], stop)
        first = tl.where(here, LAYERS[i][2], first)
        which = tl.where(here, LAYERS[i][4], which)
        gain = tl.where(here, tl.full([1], LAYERS[i][5], ACC), gain)
    row = start + (block - first) * ROWS + tl.arange(0, ROWS)
    return row, row < stop, which, gain, samples * start + row - start, stop - start


@triton.jit
def forward(
    X, W, B, Y, samples, features, x_n, x_l, x_k,
    LAYERS: tl.constexpr, COUNT: tl.constexpr, ALL_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, row_ok, which, gain, at, step = _layer(program % ALL_BLOCKS, samples, LAYERS, COUNT, ROWS, ACC)
    n = program // ALL_BLOCKS * SAMPLES + tl.arange(0, SAMPLES)
    n_ok = n < samples
    acc = tl.zeros([SAMPLES, ROWS], ACC)
    for start in range(0, features, FEATURES):
        k = start + tl.arange(0, FEATURES)
        x = tl.load(X + (n * x_n)[:, None] + which * x_l + (k * x_k)[None, :],
                    mask=n_ok[:, None] & (k < features)[None, :], other=0.0)  # fmt: skip
        w = tl.load(W + (row * features)[None, :] + k[:, None],
                    mask=row_ok[None, :] & (k < features)[:, None], other=0.0)  # fmt: skip
        acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    if B is not None:
        acc += tl.load(B + row, mask=row_ok, other=0.0).to(ACC)[None, :]
    acc *= gain
    tl.store(Y + (n * step)[:, None] + at[None, :], acc, mask=n_ok[:, None] & row_ok[None, :])


@triton.jit
def gradient_x(
    W, G, GX, samples, features, x_n, x_l, x_k,
    LAYERS: tl.constexpr, COUNT: tl.constexpr, ALL_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.cdiv(features, FEATURES)
    groups = tl.cdiv(samples, SAMPLES)
    k = program % columns * FEATURES + tl.arange(0, FEATURES)
    n = program // columns % groups * SAMPLES + tl.arange(0, SAMPLES)
    wanted = program // columns // groups
    low, high = wanted * 0, wanted * 0
    for i in tl.static_range(COUNT):
        low = tl.where(LAYERS[i][4] < wanted, LAYERS[i][3], low)
        high = tl.where(LAYERS[i][4] <= wanted, LAYERS[i][3], high)
    k_ok, n_ok = k < features, n < samples
    acc = tl.zeros([SAMPLES, FEATURES], ACC)
    for block in range(low, high):
        row, row_ok, _, gain, at, step = _layer(block, samples, LAYERS, COUNT, ROWS, ACC)
        g = tl.load(G + (n * step)[:, None] + at[None, :], mask=n_ok[:, None] & row_ok[None, :], other=0.0) * gain
        w = tl.load(W + (row * features)[:, None] + k[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(g.to(DOT), w.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(GX + (n * x_n)[:, None] + wanted * x_l + (k * x_k)[None, :], acc, mask=n_ok[:, None] & k_ok[None, :])


@triton.jit
def gradient_w(
    X, G, GW, GB, samples, features, x_n, x_l, x_k,
    LAYERS: tl.constexpr, COUNT: tl.constexpr, ALL_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, row_ok, which, gain, at, step = _layer(program % ALL_BLOCKS, samples, LAYERS, COUNT, ROWS, ACC)
    column = program // ALL_BLOCKS
    k = column * FEATURES + tl.arange(0, FEATURES)
    k_ok = k < features
    acc = tl.zeros([ROWS, FEATURES], ACC)
    total = tl.zeros([ROWS, SAMPLES], ACC)
    for start in range(0, samples, SAMPLES):
        n = start + tl.arange(0, SAMPLES)
        n_ok = n < samples
        g = tl.load(G + (n * step)[None, :] + at[:, None], mask=n_ok[None, :] & row_ok[:, None], other=0.0) * gain
        x = tl.load(X + (n * x_n)[:, None] + which * x_l + (k * x_k)[None, :], mask=n_ok[:, None] & k_ok[None, :],
                    other=0.0)  # fmt: skip
        acc = tl.dot(g.to(DOT), x.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)
        total += g.to(ACC)
    tl.store(GW + (row * features)[:, None] + k[None, :], acc, mask=row_ok[:, None] & k_ok[None, :])
    tl.store(GB + row, tl.sum(total, 1), mask=row_ok & (column == 0))


def _run(kernel, grid: int, *tensors: Tensor | None, x: Tensor, constants: dict[str, Any]) -> None:
    """x: what has the shape and strides of ws."""
    samples, _, features = x.shape
    launch.run(kernel, (grid,), *tensors, samples, features, *x.stride(), **constants)


class Styles(Function):
    """x [N, L, K], w [R, K], b [R] or None → y [N·R]."""

    @staticmethod
    def forward(ctx, x, w, b, layers):
        ctx.save_for_backward(x, w)
        ctx.layers = layers
        constants = layers.constants(x)
        y = torch.empty(len(x) * len(w), dtype=x.dtype, device=x.device)
        grid = constants["ALL_BLOCKS"] * -(-len(x) // constants["SAMPLES"])
        b = None if b is None else b.contiguous()
        _run(forward, grid, x, w.contiguous(), b, y, x=x, constants=constants)
        return y

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        want_x, want_w, want_b, _ = launch.wanted(ctx)
        gx = _GradientX.apply(g, w, x.shape[1], ctx.layers) if want_x else None
        gw, gb = _GradientW.apply(g, x, ctx.layers) if want_w or want_b else (None, None)
        return gx, gw if want_w else None, gb if want_b else None, None


class _GradientX(Function):
    @staticmethod
    def forward(ctx, g, w, count, layers):
        ctx.save_for_backward(g, w)
        ctx.layers = layers
        rows, features = w.shape
        gx = torch.empty(len(g) // max(1, rows), count, features, dtype=w.dtype, device=w.device)
        constants = layers.constants(gx)
        grid = count * -(-len(gx) // constants["SAMPLES"]) * -(-features // constants["FEATURES"])
        _run(gradient_x, grid, w.contiguous(), g.contiguous(), gx, x=gx, constants=constants)
        return gx

    @staticmethod
    def backward(ctx, h):
        g, w = ctx.saved_tensors
        want_g, want_w, *_ = launch.wanted(ctx)
        gg = Styles.apply(h, w, None, ctx.layers) if want_g else None
        return gg, _GradientW.apply(g, h, ctx.layers)[0] if want_w else None, None, None


class _GradientW(Function):
    """g, x → gw [R, K], gb [R]."""

    @staticmethod
    def forward(ctx, g, x, layers):
        ctx.save_for_backward(g, x)
        ctx.layers = layers
        ctx.set_materialize_grads(False)
        constants = layers.constants(x)
        rows, features = sum(layers.sizes), x.shape[2]
        gw = torch.empty(rows, features, dtype=x.dtype, device=x.device)
        gb = torch.empty(rows, dtype=x.dtype, device=x.device)
        grid = constants["ALL_BLOCKS"] * -(-features // constants["FEATURES"])
        _run(gradient_w, grid, x, g.contiguous(), gw, gb, x=x, constants=constants)
        return gw, gb

    @staticmethod
    def backward(ctx, hw, hb):
        g, x = ctx.saved_tensors
        if hw is None and hb is None:
            return None, None, None
        want_g, want_x, _ = launch.wanted(ctx)
        if hw is None:
            hw = x.new_zeros(len(hb), x.shape[2])
        gg = Styles.apply(x, hw, hb, ctx.layers) if want_g else None
        return gg, _GradientX.apply(g, hw, x.shape[1], ctx.layers) if want_x else None, None
