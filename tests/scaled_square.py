"""y = scale[c]·x²: a small op with all that the contract looks at, and forms of it that are broken on purpose.

It has a nonlinear second derivative, a parameter reduced over pixels in a fixed order, and honours every stride.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsrgan.kernels import launch

_calls = itertools.count()


def scaled_square_torch(x: Tensor, scale: Tensor) -> Tensor:
    """The definition: x [N, C, H, W], scale [C]."""
    return x.square() * scale.to(x.dtype).reshape(1, -1, 1, 1)


@triton.jit
def _place(N, C, H, W, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SWAP: tl.constexpr, UNMASKED: tl.constexpr):
    """Image, row, column [P, 1], channel [1, C] and mask of one tile of pixels × channels of one image."""
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    width = H if SWAP else W
    mask = (p < H * W) & (c < C)
    if UNMASKED:
        mask = (p < H * W) & (c < C + BLOCK_C)
    return n, p // width, p % width, c, mask


@triton.jit
def _forward(
    X, S, Y, N, C, H, W, xn, xc, xh, xw, yn, yc, yh, yw,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SWAP: tl.constexpr, UNMASKED: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    n, h, w, c, mask = _place(N, C, H, W, BLOCK_P, BLOCK_C, SWAP, UNMASKED)
    x = tl.load(X + n * xn + c * xc + h * xh + w * xw, mask=mask, other=0).to(ACC)
    s = tl.load(S + (c + SHIFT) % C, mask=c < C, other=0).to(ACC)
    tl.store(Y + n * yn + c * yc + h * yh + w * yw, (x * x * s).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    X, S, G, V, U, GX, GG, PARTIAL, N, C, H, W,
    xn, xc, xh, xw, gn, gc, gh, gw, vn, vc, vh, vw, yn, yc, yh, yw, zn, zc, zh, zw,
    SECOND: tl.constexpr, TWICE: tl.constexpr, FORGET_U: tl.constexpr,
    ACC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SWAP: tl.constexpr, UNMASKED: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """First: GX = 2·x·s·g, PARTIAL = Σ_p x²·g. Second, of <GX, v> + <PARTIAL, u>: GX = 2·s·g·v + 2·u·x·g,
    PARTIAL = Σ_p 2·x·g·v, GG = 2·x·s·v + u·x².
    """
    n, h, w, c, mask = _place(N, C, H, W, BLOCK_P, BLOCK_C, SWAP, UNMASKED)
    x = tl.load(X + n * xn + c * xc + h * xh + w * xw, mask=mask, other=0).to(ACC)
    g = tl.load(G + n * gn + c * gc + h * gh + w * gw, mask=mask, other=0).to(ACC)
    s = tl.load(S + (c + SHIFT) % C, mask=c < C, other=0).to(ACC)
    gx = 2 * x * s * g
    gs = x * x * g
    if SECOND:
        v = tl.load(V + n * vn + c * vc + h * vh + w * vw, mask=mask, other=0).to(ACC)
        u = tl.load(U + c, mask=c < C, other=0).to(ACC)
        if FORGET_U:
            u = u * 0
        gx = TWICE * s * g * v + 2 * u * x * g
        gs = 2 * x * g * v
        gg = 2 * x * s * v + u * x * x
        tl.store(GG + n * zn + c * zc + h * zh + w * zw, gg.to(GG.dtype.element_ty), mask=mask)
    tl.store(GX + n * yn + c * yc + h * yh + w * yw, gx.to(GX.dtype.element_ty), mask=mask)
    tile = n * tl.num_programs(1) + tl.program_id(1)
    row = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(PARTIAL + tile * C + row, tl.sum(gs, 0), mask=row < C)


def _options(x: Tensor, broken: str) -> tuple[tuple[int, int, int], dict]:
    n, c, h, w = x.shape
    pixels = 16 if broken == "another block a call" and next(_calls) % 2 else 64
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    if broken == "accumulates in x's dtype" and x.dtype == torch.float16:
        acc = tl.float16
    tiles = h * w // pixels if broken == "last tile left out" and h * w >= pixels else triton.cdiv(h * w, pixels)
    options = {
        "SWAP": broken == "height for width",
        "SHIFT": int(broken == "wrong index"),
        "UNMASKED": broken == "missing mask",
    }
    return (n, tiles, triton.cdiv(c, 32)), {"ACC": acc, "BLOCK_P": pixels, "BLOCK_C": 32, **options}


def _strides(t: Tensor, broken: str) -> tuple[int, ...]:
    return t.contiguous().stride() if broken == "ignores strides" else t.stride()


def _launch_forward(x: Tensor, scale: Tensor, broken: str) -> Tensor:
    y = torch.empty_like(x)
    scale = scale.contiguous()
    grid, options = _options(x, broken)
    launch.run(_forward, grid, x, scale, y, *x.shape, *_strides(x, broken), *y.stride(), **options)
    return y


def _launch_backward(x, scale, g, v, u, broken: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """gx, gscale, and for the second derivative (v and u given) gg."""
    second = v is not None
    gx = g if broken == "writes its input" and g.stride() == x.stride() else torch.empty_like(x)
    gg = torch.empty_like(x) if second else None
    grid, options = _options(x, broken)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(grid[0] * grid[1], x.shape[1], dtype=wide, device=x.device)
    scale = scale.contiguous()
    v, u, z = (v, u.contiguous(), gg) if second else (g, scale, gx)
    strides = [s for t in (x, g, v, gx, z) for s in _strides(t, broken)]
    launch.run(
        _backward, grid, x, scale, g, v, u, gx, z, partial, *x.shape, *strides,
        SECOND=second, TWICE=1 if broken == "wrong second" else 2, FORGET_U=broken == "forgets a term", **options,
    )  # fmt: skip
    return gx, partial.sum(0).to(scale.dtype), gg


class _ScaledSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, broken):
        ctx.save_for_backward(x, scale)
        ctx.broken = broken
        return _launch_forward(x.contiguous() if broken == "copies" else x, scale, broken)

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        if ctx.broken == "second detached":
            return *_launch_backward(x, scale, g, None, None, ctx.broken)[:2], None
        if ctx.broken == "wrong alone" and not ctx.needs_input_grad[1]:
            return g * x * scale.reshape(1, -1, 1, 1), None, None
        gradient = _DetachedGradient if ctx.broken == "third detached" else _Gradient
        return *gradient.apply(x, scale, g, ctx.broken), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, g, broken):
        ctx.save_for_backward(x, scale, g)
        ctx.broken = broken
        return _launch_backward(x, scale, g, None, None, broken)[:2]

    @staticmethod
    @launch.once_differentiable("the gradient of scaled_square")
    def backward(ctx, v, u):
        return *_launch_backward(*ctx.saved_tensors, v, u, ctx.broken), None


class _DetachedGradient(_Gradient):
    @staticmethod
    def backward(ctx, v, u):
        return *_launch_backward(*ctx.saved_tensors, v, u, ctx.broken), None


def scaled_square(x: Tensor, scale: Tensor, broken: str = "") -> Tensor:
    """scale[c]·x², differentiable twice; `broken` is one of BROKEN."""
    if launch.backend(x) == "torch" or broken == "plain torch":
        return scaled_square_torch(x, scale)
    return _ScaledSquare.apply(x, scale, broken)
