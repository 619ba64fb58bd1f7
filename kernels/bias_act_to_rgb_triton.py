"""bias_act and to_rgb in one Triton pass, and one pass for the gradients of both.

    p = x·demod + noise·strength + bias        y = clamp(act(p)·gain, ±clamp)        v[n,o,c] = w[o,c]·style[n,c]
    t[n,o,p] = Σ_c y·v        rgb = upsample(image) + clamp(t + rgb_bias)        z = y·s, s the next style

Forward: a program holds some pixels of one sample and goes through all blocks of their channels: it writes y block by
block, adds up t in registers and ends with bias, clamp and image. First derivative, r the gradient of rgb where
unclamped:

    h = gy + gz·s + Σ_o r·v        g = h·∂y/∂p
    gx = g·demod    gbias = Σ g    gdemod = Σ g·x    gstrength = Σ g·noise    gv = Σ r·y    grgb_bias = Σ r
    gs = Σ gz·y

h is made in registers and never written. As in bias_act y is read where it tells the side and the clamp, else x, of
which y is made anew. Sums are taken in the same pass, one row of partial sums a program, in a fixed order.

Second derivative: h is linear in gy, gz, s, r and v, so it is composed of the second derivatives of the ops
(`bias_act_triton.second`; `to_rgb_triton.Project` and `Gradient`), and that of y goes on through the graph of y.

Bytes per pixel with C channels of b bytes and 3 image channels, where the image is half as large, and unfused:

    forward     2·C·b + 15      x → y, rgb                  3·C·b + 15
    gradient    3·C·b + 12      gy, r, x or y → gx          6·C·b + 12   (and one more sum of two gradients of y)
    with a next style       C·b more forward, none in the gradient where y has no other reader; unfused 2·C·b and 3·C·b
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import blocks as table
from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail, pairs
from hsrgan.kernels.bias_act_kernels import load_map, load_vector, tile_at, write_sums
from hsrgan.kernels.bias_act_triton import (
    Chain,
    First,
    dense,
    flags,
    numbers,
    pointers,
    second,
    sum_over,
    times_style,
    times_style_second,
)
from hsrgan.kernels.fir4_triton import accumulator, empty, is_nhwc
from hsrgan.kernels.pointwise_triton import (
    SMOOTH,
    chain_of,
    pointwise,
    pointwise_gradient,
    pointwise_gradient_from_y,
    pre_activation,
)
from hsrgan.kernels.tiles import Walk, channels_fastest, tile, tile_of_sums, tiles_per_program, walk
from hsrgan.kernels.to_rgb_triton import (
    Gradient,
    Project,
    finish,
    flat,
    image_gradient,
    incoming,
    project_tile,
    projection,
    shown,
)


@triton.jit
def forward(
    X, BIAS, DEMOD, NOISE, STRENGTH, Y, STYLE, Z, V, RGB_BIAS, IMAGE, F, MASK, RGB,
    channels, pixels, width, chunks, image_h, image_w,
    xn, xc, xh, xw, nn, nc, nh, nw, yn, yc, yh, yw, r_n, r_c, r_w, i_n, i_c, i_h, i_w,
    HAS_BIAS: tl.constexpr, HAS_DEMOD: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_STRENGTH: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
    OUTPUTS: tl.constexpr, RGB_CLAMP: tl.constexpr, UP: tl.constexpr, IN_ROW: tl.constexpr,
    ACC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """BLOCK_P pixels of y and rgb a program, in BLOCKS blocks of channels. chunks: programs of a sample. Z has the
    strides of Y, and is None without a STYLE."""
    n = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks) * BLOCK_P
    p = start + tl.arange(0, BLOCK_P)
    wide = p.to(tl.int64)
    ok = p < pixels
    shift = load_map(NOISE, n, wide, ok, nn, nh, nw, width, SPLIT, ACC, HAS_NOISE)
    if HAS_STRENGTH:
        shift = shift * tl.load(STRENGTH).to(ACC)
    v = V + n * channels * OUTPUTS
    t0 = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    t1, t2, t3 = t0, t0, t0
    for block in range(BLOCKS):
        ch = block * BLOCK_C + tl.arange(0, BLOCK_C)
        c = ch.to(tl.int64)
        ch_ok = ch < channels
        both = ok[:, None] & ch_ok[None, :]
        x = tl.load(tile_at(X, n, c, wide, xn, xc, xh, xw, width, SPLIT), mask=both, other=0.0).to(ACC)
        bias = load_vector(BIAS, c, ch_ok, ACC, HAS_BIAS)
        demod = load_vector(DEMOD, n * channels + c, ch_ok, ACC, HAS_DEMOD)
        y = pointwise(pre_activation(x, demod, shift, bias, HAS_DEMOD, HAS_NOISE, HAS_BIAS), ACT, SLOPE, GAIN, CLAMP)
        tl.store(tile_at(Y, n, c, wide, yn, yc, yh, yw, width, SPLIT), y.to(Y.dtype.element_ty), mask=both)
        if Z is not None:
            z = y * tl.load(STYLE + n * channels + c, mask=ch_ok, other=0.0).to(ACC)[None, :]
            tl.store(tile_at(Z, n, c, wide, yn, yc, yh, yw, width, SPLIT), z.to(Z.dtype.element_ty), mask=both)
        t0 = project_tile(t0, y, v, ch, ch_ok, BLOCKS, ACC)
        if OUTPUTS > 1:
            t1 = project_tile(t1, y, v + channels, ch, ch_ok, BLOCKS, ACC)
        if OUTPUTS > 2:
            t2 = project_tile(t2, y, v + 2 * channels, ch, ch_ok, BLOCKS, ACC)
        if OUTPUTS > 3:
            t3 = project_tile(t3, y, v + 3 * channels, ch, ch_ok, BLOCKS, ACC)
    finish(t0, t1, t2, t3, n, start, pixels, RGB_BIAS, IMAGE, F, MASK, RGB, width, image_h, image_w, r_n, r_c, r_w, i_n,
           i_c, i_h, i_w, OUTPUTS, RGB_CLAMP, UP, False, IN_ROW, ACC)  # fmt: skip


@triton.jit
def gradient(
    GY, GZ, STYLE, GRGB, REF, BIAS, DEMOD, NOISE, STRENGTH, V, MASK, GX, SUMS, RGB_SUMS,
    channels, pixels, width, chunks, blocks, plane,
    yn, yc, yh, yw, zn, zc, zh, zw, xn, xc, xh, xw, nn, nc, nh, nw, gn, gc, gh, gw, r_n, r_c, r_h, r_w,
    FROM_Y: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DEMOD: tl.constexpr, HAS_NOISE: tl.constexpr,
    HAS_STRENGTH: tl.constexpr,
    WANT_BIAS: tl.constexpr, WANT_DEMOD: tl.constexpr, WANT_STRENGTH: tl.constexpr, WANT_STYLE: tl.constexpr,
    WANT_V: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr, OUTPUTS: tl.constexpr,
    ACC: tl.constexpr, SPLIT: tl.constexpr, R_SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles of gx a program. SUMS [sums, N·chunks, C], `plane` apart: the rows of v, then bias, demod, strength,
    style, those that are wanted; RGB_SUMS [N·chunks, OUTPUTS]: rgb_bias's. REF is y (FROM_Y) or x; None: not given or
    wanted.
    """
    program = tl.program_id(0)
    block = program % blocks
    row = program // blocks
    n = (row // chunks).to(tl.int64)
    first = (row % chunks) * TILES * BLOCK_P
    ch = block * BLOCK_C + tl.arange(0, BLOCK_C)
    c = ch.to(tl.int64)
    ch_ok = ch < channels
    bias = load_vector(BIAS, c, ch_ok, ACC, HAS_BIAS)
    demod = load_vector(DEMOD, n * channels + c, ch_ok, ACC, HAS_DEMOD)
    if GZ is not None:
        style = tl.load(STYLE + n * channels + c, mask=ch_ok, other=0.0).to(ACC)
    strength = tl.full([1], 1.0, ACC)
    if HAS_STRENGTH:
        strength = tl.load(STRENGTH).to(ACC)
    zero = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    along = tl.zeros([BLOCK_P], ACC)
    sum_bias, sum_demod, sum_strength, sum_style = zero, zero, along, zero
    s0, s1, s2, s3 = zero, zero, zero, zero
    b0, b1, b2, b3 = along, along, along, along
    for k in range(TILES):
        p = first + k * BLOCK_P + tl.arange(0, BLOCK_P)
        wide = p.to(tl.int64)
        ok = p < pixels
        both = ok[:, None] & ch_ok[None, :]
        h = zero
        if GY is not None:
            h = tl.load(tile_at(GY, n, c, wide, yn, yc, yh, yw, width, SPLIT), mask=both, other=0.0).to(ACC)
        ref = tl.load(tile_at(REF, n, c, wide, xn, xc, xh, xw, width, SPLIT), mask=both, other=0.0).to(ACC)
        noise = load_map(NOISE, n, wide, ok, nn, nh, nw, width, SPLIT, ACC, HAS_NOISE)
        y = ref
        if not FROM_Y:
            pre = pre_activation(ref, demod, noise * strength, bias, HAS_DEMOD, HAS_NOISE, HAS_BIAS)
            y = pointwise(pre, ACT, SLOPE, GAIN, CLAMP)
        if GZ is not None:
            gz = tl.load(tile_at(GZ, n, c, wide, zn, zc, zh, zw, width, SPLIT), mask=both, other=0.0).to(ACC)
            h += gz * style[None, :]
            sum_style += gz * y
        hidden = tl.zeros([BLOCK_P], tl.int32)
        if MASK is not None:
            hidden = tl.load(MASK + n * pixels + p, mask=ok, other=0).to(tl.int32)
        for o in tl.static_range(OUTPUTS):
            r = incoming(GRGB, n, o, p, ok, hidden, width, r_n, r_c, r_h, r_w, R_SPLIT, ACC)
            v = tl.load(V + (n * OUTPUTS + o) * channels + c, mask=ch_ok, other=0.0).to(ACC)
            h += r[:, None] * v[None, :]
            if o == 0:
                s0 += r[:, None] * y
                b0 += r
            elif o == 1:
                s1 += r[:, None] * y
                b1 += r
            elif o == 2:
                s2 += r[:, None] * y
                b2 += r
            else:
                s3 += r[:, None] * y
                b3 += r
        if FROM_Y:
            g = pointwise_gradient_from_y(h, ref, SLOPE, GAIN, CLAMP)
        else:
            g = pointwise_gradient(h, pre, ACT, SLOPE, GAIN, CLAMP)
        sum_bias += g
        sum_demod += g * ref
        sum_strength += tl.sum(g, 1) * noise
        if GX is not None:
            if HAS_DEMOD:
                g = g * demod[None, :]
            tl.store(tile_at(GX, n, c, wide, gn, gc, gh, gw, width, SPLIT), g.to(GX.dtype.element_ty), mask=both)
    into = SUMS
    if SUMS is not None:
        into = SUMS + row.to(tl.int64) * channels
    for o in tl.static_range(OUTPUTS):
        if WANT_V:
            s = tl.sum(s0 if o == 0 else s1 if o == 1 else s2 if o == 2 else s3, 0)
            tl.store(into + c, s, mask=ch_ok)
            into += plane
        if RGB_SUMS is not None:
            b = tl.sum(b0 if o == 0 else b1 if o == 1 else b2 if o == 2 else b3, 0)
            tl.store(RGB_SUMS + row * OUTPUTS + o, b, mask=block == 0)
    if WANT_BIAS or WANT_DEMOD or WANT_STRENGTH or WANT_STYLE:
        write_sums(into, plane, c, ch_ok, block * BLOCK_C, sum_bias, sum_demod, sum_strength, sum_style, WANT_BIAS,
                   WANT_DEMOD, WANT_STRENGTH, WANT_STYLE)  # fmt: skip


def bias_act_to_rgb_triton(
    x: Tensor, weight: Tensor, style: Tensor, tail: Tail, rgb_bias: Tensor | None, rgb_clamp: float | None,
    image: Tensor | None, f: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`bias_act_to_rgb` of checked arguments. Differentiable twice; noise is a constant."""
    bias, demod, noise, strength = tail.operands
    v, rgb_bias, image, f = projection(x, weight, style, rgb_bias, image, f)
    noise = None if noise is None else noise.detach()
    chain = chain_of(tail, x.dtype)
    return _Forward.apply(x, bias, demod, noise, strength, tail.next_style, v, rgb_bias, image, f, chain, rgb_clamp)


class _Forward(Function):
    @staticmethod
    def forward(ctx, x, bias, demod, noise, strength, style, v, rgb_bias, image, f, constants, rgb_clamp):
        y = torch.empty_like(x)
        z = None if style is None else torch.empty_like(x)
        (n, c, h, w), outputs = x.shape, v.shape[1]
        rgb = empty(v, n, outputs, h, w, nhwc=is_nhwc(x))
        mask = None
        if rgb_clamp is not None and any(ctx.needs_input_grad):
            mask = torch.empty(n, h, w, dtype=torch.uint8, device=x.device)
        up = image is not None and image.shape[2:] != x.shape[2:]
        piecewise = constants["ACT"] not in SMOOTH and constants["GAIN"] > 0
        ctx.chain = chain = Chain(constants, piecewise and not ctx.needs_input_grad[2], x.shape, y.stride())
        ctx.up, ctx.nhwc = up, None if image is None else is_nhwc(image)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            None if chain.from_y else x, y, bias, demod, noise, strength, style, v, rgb_bias, mask, f
        )  # fmt: skip

        *small, style = dense(bias, demod, noise, strength, style)
        over = _walk(x.shape, x, noise, y)
        sizes = table.sizes("bias_act_to_rgb.forward", x)
        block_p, block_c = tile_of_sums(c, h * w, channels_fastest(x.shape, y.stride()), sizes.pop("elements"))
        chunks = -(-h * w // block_p)
        image_numbers = (0,) * 6 if image is None else (*image.shape[2:], *image.stride())
        launch.run(
            forward, (n * chunks,), *pointers(x, *small, y), style, z, v.contiguous(), dense(rgb_bias)[0], image,
            f.contiguous() if up else None, mask, rgb, c, h * w, w, chunks, *image_numbers[:2], *numbers(over),
            rgb.stride(0), rgb.stride(1), rgb.stride(3), *image_numbers[2:],
            **flags("HAS", *small), **constants, OUTPUTS=outputs, RGB_CLAMP=rgb_clamp, UP=up, IN_ROW=w % block_p == 0,
            ACC=accumulator(x), SPLIT=over.split, BLOCK_P=block_p, BLOCK_C=block_c, BLOCKS=-(-c // block_c), **sizes,
        )  # fmt: skip
        return (y, rgb) if z is None else (y, rgb, z)

    @staticmethod
    def backward(ctx, gy, grgb, gz=None):
        x, y, bias, demod, noise, strength, style, v, rgb_bias, mask, f = ctx.saved_tensors
        want_x, want_bias, want_demod, _, want_strength, want_style, want_v, want_rgb_bias, want_image, *_ = (
            launch.wanted(ctx)
        )  # fmt: skip
        tail = [want_x, want_bias, want_demod, want_strength]
        gx = gbias = gdemod = gstrength = gstyle = gv = grgb_bias = gimage = None
        if grgb is None and gz is not None:  # no training does this: two passes will do
            g, gstyle = times_style(gz, y, style)
            gy = g if gy is None else gy + g
        if grgb is None and gy is not None and any(tail):
            ref = y.detach() if ctx.chain.from_y else x
            want = [*tail[:3], False, want_strength, False]
            gx, gbias, gdemod, _, gstrength, _ = First.apply(
                gy, ref, bias, demod, noise, strength, None, ctx.chain, want, None
            )
        want_style = want_style and gz is not None
        if grgb is not None and any((*tail, want_style, want_v, want_rgb_bias)):
            want = [*tail, want_style, want_v, want_rgb_bias]
            gx, gbias, gdemod, gstrength, gstyle, gv, grgb_bias = _Gradient.apply(
                gy, gz, grgb, x, y, bias, demod, noise, strength, style, v, rgb_bias, mask, ctx.chain, want
            )
        if want_image and grgb is not None:
            gimage = image_gradient(grgb, f, ctx.up, ctx.nhwc)
        return gx, gbias, gdemod, None, gstrength, gstyle, gv, grgb_bias, gimage, None, None, None


class _Gradient(Function):
    """gy, gz, grgb, x or (chain.from_y) y, v, … → gradients of x, bias, demod, strength, style, v and rgb_bias.

    y is an operand in any case: it stands for itself in gv and in the style's, and its graph goes on where it came
    from.
    """

    @staticmethod
    def forward(ctx, gy, gz, grgb, x, y, bias, demod, noise, strength, style, v, rgb_bias, mask, chain, want):
        ctx.save_for_backward(gy, gz, grgb, x, y, bias, demod, noise, strength, style, v, rgb_bias, mask)
        ctx.chain = chain
        ctx.set_materialize_grads(False)
        want_x, want_bias, want_demod, want_strength, want_style, want_v, want_rgb_bias = want
        (n, c, h, w), outputs = y.shape, v.shape[1]
        ref = y if chain.from_y else x
        gx = chain.empty(y) if want_x else None
        *small, scale = dense(bias, demod, noise, strength, style)
        over = _walk(y.shape, gy, gz, ref, noise, gx)
        by_channels = channels_fastest(y.shape, chain.strides)
        sizes = table.sizes("bias_act_to_rgb.gradient", y)
        block_p, block_c = tile(c, h * w, by_channels, sizes.pop("elements"))
        blocks, chunks = -(-c // block_c), -(-h * w // block_p)
        planes = want_v * outputs + want_bias + want_demod + want_strength + want_style
        tiles = tiles_per_program(n * chunks * blocks)
        chunks = -(-chunks // tiles)
        sums = torch.empty(planes, n, chunks, c, dtype=v.dtype, device=y.device) if planes else None
        rgb_sums = torch.empty(n, chunks, outputs, dtype=v.dtype, device=y.device) if want_rgb_bias else None
        launch.run(
            gradient, (n * chunks * blocks,),
            gy, gz, None if gz is None else scale, grgb, *pointers(ref, *small), v.contiguous(), mask, gx, sums,
            rgb_sums,
            c, h * w, w, chunks, blocks, n * chunks * c, *numbers(over), *grgb.stride(),
            **sizes, FROM_Y=chain.from_y, **flags("HAS", *small),
            WANT_BIAS=want_bias, WANT_DEMOD=want_demod, WANT_STRENGTH=want_strength, WANT_STYLE=want_style,
            WANT_V=want_v, **chain.constants, OUTPUTS=outputs, ACC=accumulator(y), SPLIT=over.split,
            R_SPLIT=not flat(grgb), BLOCK_P=block_p, BLOCK_C=block_c, TILES=tiles,
        )  # fmt: skip
        totals = () if sums is None else sum_over(sums, 2)
        gv = totals[:outputs].transpose(0, 1) if want_v else None
        totals = iter(totals[outputs * want_v :])
        gbias = sum_over(next(totals), 0).to(bias.dtype) if want_bias else None
        gdemod = next(totals).to(demod.dtype) if want_demod else None
        gstrength = next(totals).sum().to(strength.dtype).reshape(strength.shape) if want_strength else None
        gstyle = next(totals).to(style.dtype) if want_style else None
        return gx, gbias, gdemod, gstrength, gstyle, gv, None if rgb_sums is None else rgb_sums.sum((0, 1))

    @staticmethod
    def backward(ctx, hx, hbias, hdemod, hstrength, hstyle, hv, hrgb_bias):
        gy, gz, grgb, x, y, bias, demod, noise, strength, style, v, rgb_bias, mask = ctx.saved_tensors
        want_gy, want_gz, want_grgb, want_x, want_y, want_bias, want_demod, _, want_strength, want_style, want_v, *_ = (
            launch.wanted(ctx)
        )  # fmt: skip
        cotangents = (hx, hbias, hdemod, None, hstrength, None)
        h = hh = gx = gbias = gdemod = gstrength = None
        if any(t is not None for t in cotangents):
            h = Gradient.apply(grgb, y, v, mask, True, False, False)[0]
            h = h if gy is None else gy + h
            h = h if gz is None else torch.addcmul(h, gz, pairs(style, gz))
            ref = y.detach() if ctx.chain.from_y else x
            through = want_gy or want_gz or want_grgb or want_style or want_v
            want = [through, want_x, want_bias, want_demod, False, want_strength, False]
            operands = (h, ref, bias, demod, noise, strength, None)
            hh, gx, gbias, gdemod, _, gstrength, _ = second(operands, cotangents, ctx.chain, want)
        ggz = gy2 = gstyle = None
        if gz is not None:
            ggz, gy2, gstyle = times_style_second(gz, y, style, hh, hstyle, (want_gz, want_y, want_style))
        ggrgb = gv = None
        if want_grgb:
            parts = [] if hh is None else [Project.apply(hh, v, mask)]
            parts += [] if hv is None else [Project.apply(y, hv, mask)]
            parts += [] if hrgb_bias is None else [shown(hrgb_bias, grgb, mask)]
            ggrgb = sum(parts[1:], parts[0]) if parts else None
        if want_v and hh is not None:
            gv = Gradient.apply(grgb, hh, v, mask, False, True, False)[1]
        if want_y and hv is not None:
            g = Gradient.apply(grgb, y, hv, mask, True, False, False)[0]
            gy2 = g if gy2 is None else gy2 + g
        # zero, not missing, where rgb_bias moves the clamp: an optimiser tells them apart (to_rgb does the same)
        moves = rgb_bias is not None and mask is not None and ctx.needs_input_grad[11]
        none = [None] * 3
        return (
            hh if want_gy else None, ggz, ggrgb, gx, gy2, gbias, gdemod, None, gstrength, gstyle, gv,
            torch.zeros_like(rgb_bias) if moves else None, *none,
        )  # fmt: skip


def _walk(shape: torch.Size, *large: Tensor | None) -> Walk:
    """large: in the kernel's order; noise is expanded, None has strides of 0."""
    return walk(shape, [None if t is None else t.expand(shape) for t in large], per_sample=True)
