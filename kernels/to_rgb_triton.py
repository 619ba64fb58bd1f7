"""to_rgb in Triton: x is read once, forward, and once for all its gradients.

    v[n,o,c] = w[o,c]·style[n,c]            a small product of PyTorch's: its autograd does the rest
    t[n,o,p] = Σ_c x[n,c,p]·v[n,o,c]
    y = upsample(image) + clamp(t + bias)
    gx = Σ_o g·v      gv = Σ_p g·x      gbias = Σ_np g               one pass; g = gy where unclamped
    gimage = the transpose of upsample, an upfirdn2d

t is linear in x and in v: every derivative is one of the lines above, so that any order holds. What was clamped is kept
as a bit for each output, one byte a pixel.

Bytes per pixel with C channels of b bytes and 3 outputs: forward C·b + 12 (+ 3 for the smaller image, + 1 with a
clamp), gradients 2·C·b + 12 (+ 1). Unfused the forward pass moves 3·C·b + 70.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import blocks as table
from hsrgan.kernels import launch
from hsrgan.kernels.fir4_triton import accumulator, empty, is_nhwc
from hsrgan.kernels.pointwise_triton import limit_like
from hsrgan.kernels.tiles import tile, tile_of_sums, tiles_per_program
from hsrgan.kernels.upfirdn2d_triton import UpFirDn


@triton.jit
def project_tile(t, x, V, ch, ch_ok, BLOCKS: tl.constexpr, ACC: tl.constexpr):
    """t so far, plus x [pixels, channels] in ACC times one row of v, V pointing to its channel 0: not summed over the
    channels of a block yet. Of one block the products alone, which tl.sum(…, 1) can multiply and add at once.
    """
    product = x * tl.load(V + ch, mask=ch_ok, other=0.0).to(ACC)[None, :]
    if BLOCKS > 1:
        product += t
    return product


@triton.jit
def _upsampled(IMAGE, F, i, j, height, width, i_h, i_w, ok, ACC: tl.constexpr):
    """2× upsampling by 4 taps, padding [2, 1], gain 4, at rows i (one, or [pixels, 1]) and columns j [pixels, 1]: 2 × 2
    taps. height, width: of IMAGE [1, outputs], half as large as what is made."""
    f0, f1 = tl.load(F).to(ACC), tl.load(F + 1).to(ACC)
    f2, f3 = tl.load(F + 2).to(ACC), tl.load(F + 3).to(ACC)
    odd_i, odd_j = i % 2 == 1, j % 2 == 1
    row, col = (i + 1) // 2 - 1, (j + 1) // 2 - 1
    at = IMAGE + row.to(tl.int64) * i_h + col * i_w
    left, right = ok & (col >= 0), ok & (col + 1 < width)
    near, far = tl.where(odd_j, f2, f3), tl.where(odd_j, f0, f1)
    above = row >= 0
    total = near * tl.load(at, mask=left & above, other=0.0).to(ACC)
    total += far * tl.load(at + i_w, mask=right & above, other=0.0).to(ACC)
    below = row + 1 < height
    at += i_h
    lower = near * tl.load(at, mask=left & below, other=0.0).to(ACC)
    lower += far * tl.load(at + i_w, mask=right & below, other=0.0).to(ACC)
    return 4.0 * (total * tl.where(odd_i, f2, f3) + lower * tl.where(odd_i, f0, f1))


@triton.jit
def finish(t0, t1, t2, t3, n, start, pixels, BIAS, IMAGE, F, MASK, Y, width, image_h, image_w, y_n, y_c, y_w, i_n, i_c,
           i_h, i_w, OUTPUTS: tl.constexpr, CLAMP: tl.constexpr, UP: tl.constexpr, GIVEN_MASK: tl.constexpr,
           IN_ROW: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The sums over channels of t, bias, clamp and image, stored from pixel `start` on; MASK is written, or GIVEN: y is
    zero at its bits. IN_ROW: the pixels lie in one row.

    As a tile [pixels, 4]: one of [pixels] each would be worked on by every thread that holds a channel of that pixel.
    """
    joined = tl.join(tl.join(tl.sum(t0, 1), tl.sum(t2, 1)), tl.join(tl.sum(t1, 1), tl.sum(t3, 1)))
    total = tl.reshape(joined, [t0.shape[0], 4])
    p = start + tl.arange(0, t0.shape[0])
    ok = p < pixels
    o = tl.arange(0, 4)
    there = (o < OUTPUTS)[None, :]
    both = ok[:, None] & there
    if GIVEN_MASK:
        hidden = tl.load(MASK + n * pixels + p, mask=ok, other=0).to(tl.int32)
        total = tl.where((hidden[:, None] >> o[None, :]) & 1 == 1, 0.0, total)
    if BIAS is not None:
        total += tl.load(BIAS + o, mask=o < OUTPUTS, other=0.0).to(ACC)[None, :]
    if CLAMP is not None:
        limit = limit_like(total, CLAMP)
        if MASK is not None:
            bits = tl.where(tl.abs(total) < limit, 0, 1 << o[None, :])
            tl.store(MASK + n * pixels + p, tl.sum(bits, 1).to(tl.uint8), mask=ok)
        total = tl.where(total > limit, limit, total)
        total = tl.where(total < -limit, -limit, total)
    if IMAGE is not None:
        if IN_ROW:  # one division, not one a pixel
            i = start // width
            j = (p - i * width)[:, None]
        else:
            i, j = (p // width)[:, None], (p % width)[:, None]
        image = IMAGE + n * i_n + (o * i_c)[None, :]
        if UP:
            total += _upsampled(image, F, i, j, image_h, image_w, i_h, i_w, both, ACC)
        else:
            total += tl.load(image + i.to(tl.int64) * i_h + j * i_w, mask=both, other=0.0).to(ACC)
    tl.store(Y + n * y_n + (o * y_c)[None, :] + (p * y_w)[:, None], total.to(Y.dtype.element_ty), mask=both)


@triton.jit
def _pixels_at(p, width, t_h, t_w, SPLIT: tl.constexpr):
    """Offsets of pixels p in a tensor whose rows lie t_h apart; without SPLIT t_h is width·t_w."""
    if SPLIT:
        at = (p // width).to(tl.int64) * t_h + (p % width) * t_w
    else:
        at = p.to(tl.int64) * t_w
    return at


@triton.jit
def project(
    X, V, BIAS, IMAGE, F, MASK, Y, channels, pixels, width, chunks, image_h, image_w,
    x_n, x_c, x_h, x_w, y_n, y_c, y_w, i_n, i_c, i_h, i_w,
    OUTPUTS: tl.constexpr, CLAMP: tl.constexpr, UP: tl.constexpr, GIVEN_MASK: tl.constexpr, SPLIT: tl.constexpr,
    IN_ROW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """PIXELS pixels of y, all outputs. MASK is written, or GIVEN: y is zero where its bits are set."""
    n = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks) * PIXELS
    p = start + tl.arange(0, PIXELS)
    ok = p < pixels
    x_row = (X + n * x_n + _pixels_at(p, width, x_h, x_w, SPLIT))[:, None]
    v = V + n * channels * OUTPUTS
    t0 = tl.zeros([PIXELS, CHANNELS], ACC)
    t1, t2, t3 = t0, t0, t0
    for block in range(BLOCKS):
        ch = block * CHANNELS + tl.arange(0, CHANNELS)
        ch_ok = ch < channels
        x = tl.load(x_row + (ch.to(tl.int64) * x_c)[None, :], mask=ok[:, None] & ch_ok[None, :], other=0.0).to(ACC)
        t0 = project_tile(t0, x, v, ch, ch_ok, BLOCKS, ACC)
        if OUTPUTS > 1:
            t1 = project_tile(t1, x, v + channels, ch, ch_ok, BLOCKS, ACC)
        if OUTPUTS > 2:
            t2 = project_tile(t2, x, v + 2 * channels, ch, ch_ok, BLOCKS, ACC)
        if OUTPUTS > 3:
            t3 = project_tile(t3, x, v + 3 * channels, ch, ch_ok, BLOCKS, ACC)
    finish(t0, t1, t2, t3, n, start, pixels, BIAS, IMAGE, F, MASK, Y, width, image_h, image_w, y_n, y_c, y_w, i_n, i_c,
           i_h, i_w, OUTPUTS, CLAMP, UP, GIVEN_MASK, IN_ROW, ACC)  # fmt: skip


@triton.jit
def incoming(GY, n, o: tl.constexpr, p, ok, hidden, width, g_n, g_c, g_h, g_w, SPLIT: tl.constexpr, ACC: tl.constexpr):
    """g of output o [pixels]: gy, or 0 where it was clamped."""
    at = GY + n * g_n + o * g_c + _pixels_at(p, width, g_h, g_w, SPLIT)
    g = tl.load(at, mask=ok, other=0.0).to(ACC)
    return tl.where((hidden >> o) & 1 == 1, 0.0, g)


@triton.jit
def gradient(
    GY, X, V, MASK, GX, GV, GBIAS, channels, pixels, width, chunks,
    g_n, g_c, g_h, g_w, x_n, x_c, x_h, x_w, d_n, d_c, d_w,
    OUTPUTS: tl.constexpr, SPLIT: tl.constexpr, G_SPLIT: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    TILES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """TILES tiles of gx, and their sums: GV [N, chunks, OUTPUTS, C], GBIAS [N, chunks, OUTPUTS]; None: not wanted."""
    blocks = tl.cdiv(channels, CHANNELS)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks
    n = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * TILES * PIXELS
    ch = block * CHANNELS + tl.arange(0, CHANNELS)
    ch_ok = ch < channels
    wide = ch.to(tl.int64)
    v = V
    if GX is not None:
        v = V + n * channels * OUTPUTS + ch
    s0 = tl.zeros([PIXELS, CHANNELS], ACC)
    s1, s2, s3 = s0, s0, s0
    b0 = tl.zeros([PIXELS], ACC)
    b1, b2, b3 = b0, b0, b0
    for k in range(TILES):
        p = first + k * PIXELS + tl.arange(0, PIXELS)
        ok = p < pixels
        both = ok[:, None] & ch_ok[None, :]
        hidden = tl.zeros([PIXELS], tl.int32)
        if MASK is not None:
            hidden = tl.load(MASK + n * pixels + p, mask=ok, other=0).to(tl.int32)
        x = s0
        if GV is not None:
            x_at = X + n * x_n + _pixels_at(p, width, x_h, x_w, SPLIT)
            x = tl.load(x_at[:, None] + (wide * x_c)[None, :], mask=both, other=0.0).to(ACC)
        gx = tl.zeros([PIXELS, CHANNELS], ACC)
        for o in tl.static_range(OUTPUTS):
            g = incoming(GY, n, o, p, ok, hidden, width, g_n, g_c, g_h, g_w, G_SPLIT, ACC)
            if GX is not None:
                gx += g[:, None] * tl.load(v + o * channels, mask=ch_ok, other=0.0).to(ACC)[None, :]
            if o == 0:
                s0 += g[:, None] * x
                b0 += g
            elif o == 1:
                s1 += g[:, None] * x
                b1 += g
            elif o == 2:
                s2 += g[:, None] * x
                b2 += g
            else:
                s3 += g[:, None] * x
                b3 += g
        if GX is not None:
            d_at = GX + n * d_n + p.to(tl.int64) * d_w
            tl.store(d_at[:, None] + (wide * d_c)[None, :], gx.to(GX.dtype.element_ty), mask=both)
    for o in tl.static_range(OUTPUTS):
        if GV is not None:
            s = tl.sum(s0 if o == 0 else s1 if o == 1 else s2 if o == 2 else s3, 0)
            tl.store(GV + (chunk.to(tl.int64) * OUTPUTS + o) * channels + ch, s, mask=ch_ok)
        if GBIAS is not None:
            b = tl.sum(b0 if o == 0 else b1 if o == 1 else b2 if o == 2 else b3, 0)
            tl.store(GBIAS + chunk * OUTPUTS + o, b, mask=block == 0)


def to_rgb_triton(
    x: Tensor, weight: Tensor, style: Tensor, bias: Tensor | None, clamp: float | None, image: Tensor | None,
    f: Tensor | None,
) -> Tensor:  # fmt: skip
    """`to_rgb` of checked arguments with at most MAX_OUTPUTS outputs; f 4 separable taps where image is smaller."""
    return _ToRGB.apply(x, *projection(x, weight, style, bias, image, f), clamp)


def projection(
    x: Tensor, weight: Tensor, style: Tensor, bias: Tensor | None, image: Tensor | None, f: Tensor | None
) -> tuple[Tensor | None, ...]:
    """v [N, outputs, C], bias, image, f as the kernels take them: in fp32 (fp64 for fp64 x), f a constant."""
    wide = torch.promote_types(x.dtype, torch.float32)
    v = weight.flatten(1).to(wide) * style.to(wide)[:, None]
    bias, image = (None if t is None else t.to(wide) for t in (bias, image))
    return v, bias, image, None if f is None else f.detach()


class _ToRGB(Function):
    """x, v, bias, image → y. Differentiable any number of times in all four."""

    @staticmethod
    def forward(ctx, x, v, bias, image, f, clamp):
        mask = None
        if clamp is not None:
            n, _, h, w = x.shape
            mask = torch.empty(n, h, w, dtype=torch.uint8, device=x.device)
        up = image is not None and image.shape[2:] != x.shape[2:]
        y = _launch_project(x, v, bias, image, f if up else None, clamp, mask, False)
        ctx.save_for_backward(x, v, mask, f, bias)
        ctx.nhwc = None if image is None else is_nhwc(image)
        ctx.up = up
        return y

    @staticmethod
    def backward(ctx, gy):
        x, v, mask, f, bias = ctx.saved_tensors
        want_x, want_v, want_bias, want_image, *_ = launch.wanted(ctx)
        gx = gv = gbias = gimage = None
        if want_x or want_v or want_bias:
            clamped = None if mask is None else bias
            gx, gv, gbias = Gradient.apply(gy, x, v, mask, want_x, want_v, want_bias, clamped)
        if want_image:
            gimage = image_gradient(gy, f, ctx.up, ctx.nhwc)
        return gx, gv, gbias, gimage, None, None


def image_gradient(gy: Tensor, f: Tensor | None, up: bool, nhwc: bool) -> Tensor:
    """The gradient of image: where it is upsampled the transpose of that: padding [1, 1], mirrored taps, gain 4."""
    return UpFirDn.apply(gy, f, (1, 1), (2, 2), (1, 1, 1, 1), True, 4.0, nhwc) if up else gy


class Gradient(Function):
    """gy, x, v → gx, gv, gbias, as far as wanted, of gy where mask does not hide it.

    bias, where it moves the clamp: its gradient is zero, not missing, as in PyTorch (an optimiser tells them apart).
    """

    @staticmethod
    def forward(ctx, gy, x, v, mask, want_x, want_v, want_bias, bias=None):
        ctx.save_for_backward(gy, x, v, mask)
        ctx.bias = None if bias is None else bias.shape
        ctx.set_materialize_grads(False)
        return _launch_gradient(gy, x, v, mask, want_x, want_v, want_bias)

    @staticmethod
    def backward(ctx, hx, hv, hbias):
        gy, x, v, mask = ctx.saved_tensors
        want_gy, want_x, want_v, *_ = launch.wanted(ctx)
        ggy = gx = gv = None
        if want_gy:
            parts = [] if hx is None else [Project.apply(hx, v, mask)]
            parts += [] if hv is None else [Project.apply(x, hv, mask)]
            parts += [] if hbias is None else [shown(hbias, gy, mask)]
            ggy = sum(parts[1:], parts[0]) if parts else None
        if want_x and hv is not None:
            gx, _, _ = Gradient.apply(gy, x, hv, mask, True, False, False)
        if want_v and hx is not None:
            _, gv, _ = Gradient.apply(gy, hx, v, mask, False, True, False)
        gbias = x.new_zeros(ctx.bias, dtype=v.dtype) if ctx.bias is not None and ctx.needs_input_grad[7] else None
        return ggy, gx, gv, *[None] * 4, gbias


class Project(Function):
    """x, v → Σ_c x·v where mask does not hide it: linear in both."""

    @staticmethod
    def forward(ctx, x, v, mask):
        ctx.save_for_backward(x, v, mask)
        return _launch_project(x, v, None, None, None, None, mask, mask is not None)

    @staticmethod
    def backward(ctx, gy):
        x, v, mask = ctx.saved_tensors
        want_x, want_v, _ = launch.wanted(ctx)
        gx, gv, _ = Gradient.apply(gy, x, v, mask, want_x, want_v, False)
        return gx, gv, None


def shown(each: Tensor, like: Tensor, mask: Tensor | None) -> Tensor:
    """each [outputs], as a map like `like`, zero where mask hides it."""
    each = each[:, None, None].expand(like.shape)
    if mask is None:
        return each
    bits = torch.arange(like.shape[1], device=like.device, dtype=torch.uint8)[:, None, None]
    return each * ((mask[:, None] >> bits) & 1 == 0)


def flat(t: Tensor) -> bool:
    """Do the pixels of t [N, C, H, W] lie evenly, one stride for all?"""
    return t.shape[2] == 1 or t.stride(2) == t.shape[3] * t.stride(3)


def _launch_project(x, v, bias, image, f, clamp, mask, given_mask) -> Tensor:
    n, c, h, w = x.shape
    outputs = v.shape[1]
    y = empty(v, n, outputs, h, w, nhwc=is_nhwc(x))
    sizes = table.sizes("to_rgb.project", x)
    pixels, channels = tile_of_sums(c, h * w, is_nhwc(x), sizes.pop("elements"))
    chunks = -(-h * w // pixels)
    image_numbers = (0,) * 6 if image is None else (*image.shape[2:], *image.stride())
    launch.run(
        project, (n * chunks,),
        x, v.contiguous(), None if bias is None else bias.contiguous(), image, None if f is None else f.contiguous(),
        mask, y, c, h * w, w, chunks, *image_numbers[:2],
        *x.stride(), y.stride(0), y.stride(1), y.stride(3), *image_numbers[2:],
        OUTPUTS=outputs, CLAMP=clamp, UP=f is not None, GIVEN_MASK=given_mask, SPLIT=not flat(x),
        IN_ROW=w % pixels == 0, PIXELS=pixels, CHANNELS=channels, BLOCKS=-(-c // channels), ACC=accumulator(x), **sizes,
    )  # fmt: skip
    return y


def _launch_gradient(gy, x, v, mask, want_x, want_v, want_bias) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n, c, h, w = x.shape
    outputs = v.shape[1]
    gx = empty(x, n, c, h, w, nhwc=is_nhwc(x)) if want_x else None
    sizes = table.sizes("to_rgb.gradient", x)
    pixels, channels = tile(c, h * w, is_nhwc(x), sizes.pop("elements"))
    blocks, chunks = -(-c // channels), -(-h * w // pixels)
    tiles = tiles_per_program(n * chunks * blocks)
    chunks = -(-chunks // tiles)
    gv = torch.empty(n, chunks, outputs, c, dtype=v.dtype, device=x.device) if want_v else None
    gbias = torch.empty(n, chunks, outputs, dtype=v.dtype, device=x.device) if want_bias else None
    strides = (0, 0, 0) if gx is None else (gx.stride(0), gx.stride(1), gx.stride(3))
    launch.run(
        gradient, (n * chunks * blocks,),
        gy, x, v.contiguous(), mask, gx, gv, gbias, c, h * w, w, chunks,
        *gy.stride(), *x.stride(), *strides,
        OUTPUTS=outputs, SPLIT=not flat(x), G_SPLIT=not flat(gy), PIXELS=pixels, CHANNELS=channels, TILES=tiles,
        ACC=accumulator(x), **sizes,
    )  # fmt: skip
    return gx, None if gv is None else gv.sum(1), None if gbias is None else gbias.sum((0, 1))
