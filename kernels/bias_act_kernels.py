"""The Triton kernels of bias_act: z, its gradients, and the gradients of those; bias_act_triton.py has the equations.

A program works on tiles [pixels × channels] of one sample (tiles.py; where a walk is not per sample, all samples are
one). Programs are numbered with the channel blocks varying fastest. Every tensor has its own strides: sample, channel,
row of pixels and pixel, in this order and after the tensors in the arguments' order.
"""

import triton
import triton.language as tl

from hsrgan.kernels.pointwise_triton import (
    input_from_y,
    pointwise,
    pointwise_curvature,
    pointwise_gradient,
    pointwise_gradient_from_y,
    pre_activation,
)


@triton.jit
def _along(p, sh, sw, width, SPLIT: tl.constexpr):
    """Offsets of pixels p."""
    if SPLIT:
        return (p // width) * sh + (p % width) * sw
    else:
        return p * sw


@triton.jit
def tile_at(T, n, c, p, sn, sc, sh, sw, width, SPLIT: tl.constexpr):
    """Pointers [pixels, channels] to pixels p of channels c of sample n; the offsets are int64 as n, c and p are."""
    return T + n * sn + _along(p, sh, sw, width, SPLIT)[:, None] + (c * sc)[None, :]


@triton.jit
def load_map(T, n, p, mask, sn, sh, sw, width, SPLIT: tl.constexpr, ACC: tl.constexpr, HAS: tl.constexpr):
    """Values [pixels] of a map without channels; zeros unless HAS."""
    values = tl.zeros_like(p).to(ACC)
    if HAS:
        values = tl.load(T + n * sn + _along(p, sh, sw, width, SPLIT), mask=mask, other=0.0).to(ACC)
    return values


@triton.jit
def load_vector(T, at, mask, ACC: tl.constexpr, HAS: tl.constexpr):
    """T[at] [channels]; zeros unless HAS."""
    values = tl.zeros_like(at).to(ACC)
    if HAS:
        values = tl.load(T + at, mask=mask, other=0.0).to(ACC)
    return values


@triton.jit
def write_sums(
    into, plane, c, mask, first, bias, demod, strength, style,
    WANT_BIAS: tl.constexpr, WANT_DEMOD: tl.constexpr, WANT_STRENGTH: tl.constexpr, WANT_STYLE: tl.constexpr,
):  # fmt: skip
    """The sums over pixels of the wanted ones, to planes that follow one another.

    strength [pixels] is summed over channels already: its sum goes to the block's first channel, the others get zeros.
    """
    into += c
    if WANT_BIAS:
        tl.store(into, tl.sum(bias, 0), mask=mask)
        into += plane
    if WANT_DEMOD:
        tl.store(into, tl.sum(demod, 0), mask=mask)
        into += plane
    if WANT_STRENGTH:
        tl.store(into, tl.where(c == first, tl.sum(strength, 0), 0.0), mask=mask)
        into += plane
    if WANT_STYLE:
        tl.store(into, tl.sum(style, 0), mask=mask)


@triton.jit
def forward(
    X, BIAS, DEMOD, NOISE, STRENGTH, STYLE, RESIDUAL, Z,
    channels, pixels, width, chunks, blocks,
    xn, xc, xh, xw, nn, nc, nh, nw, rn, rc, rh, rw, zn, zc, zh, zw,
    HAS_BIAS: tl.constexpr, HAS_DEMOD: tl.constexpr, HAS_NOISE: tl.constexpr, HAS_STRENGTH: tl.constexpr,
    HAS_STYLE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
    ACC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of z a program. chunks: tiles of a sample's pixels; blocks: of its channels."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    n = row // chunks
    p = (row % chunks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (program % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    mask_p = p < pixels
    mask = mask_p[:, None] & mask_c[None, :]
    pair = n * channels + c
    x = tl.load(tile_at(X, n, c, p, xn, xc, xh, xw, width, SPLIT), mask=mask, other=0.0).to(ACC)
    bias = load_vector(BIAS, c, mask_c, ACC, HAS_BIAS)
    demod = load_vector(DEMOD, pair, mask_c, ACC, HAS_DEMOD)
    shift = load_map(NOISE, n, p, mask_p, nn, nh, nw, width, SPLIT, ACC, HAS_NOISE)
    if HAS_STRENGTH:
        shift = shift * tl.load(STRENGTH).to(ACC)
    z = pointwise(pre_activation(x, demod, shift, bias, HAS_DEMOD, HAS_NOISE, HAS_BIAS), ACT, SLOPE, GAIN, CLAMP)
    if HAS_STYLE:
        z = z * load_vector(STYLE, pair, mask_c, ACC, True)[None, :]
    if HAS_RESIDUAL:
        z += tl.load(tile_at(RESIDUAL, n, c, p, rn, rc, rh, rw, width, SPLIT), mask=mask, other=0.0).to(ACC)
    tl.store(tile_at(Z, n, c, p, zn, zc, zh, zw, width, SPLIT), z.to(Z.dtype.element_ty), mask=mask)


@triton.jit
def first(
    GZ, REF, BIAS, DEMOD, NOISE, STRENGTH, STYLE, GX, SUMS, MAPS,
    samples, channels, pixels, width, chunks, blocks, plane,
    zn, zc, zh, zw, xn, xc, xh, xw, nn, nc, nh, nw, gn, gc, gh, gw,
    FROM_Y: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DEMOD: tl.constexpr, HAS_NOISE: tl.constexpr,
    HAS_STRENGTH: tl.constexpr, HAS_STYLE: tl.constexpr,
    WANT_X: tl.constexpr, WANT_BIAS: tl.constexpr, WANT_DEMOD: tl.constexpr, WANT_NOISE: tl.constexpr,
    WANT_STRENGTH: tl.constexpr, WANT_STYLE: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
    ACC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """TILES tiles of gx a program; one row of each wanted sum (bias, demod, strength, next_style) in SUMS [sums,
    samples·chunks, channels], whose first dimension has the stride `plane`; and this block's part of the gradient of
    noise in MAPS [blocks, samples, pixels].

    REF is y (FROM_Y) or x. What `input_from_y` gets wrong meets a g of zero.
    """
    program = tl.program_id(0)
    block = (program % blocks).to(tl.int64)
    row = (program // blocks).to(tl.int64)
    n = row // chunks
    start = (row % chunks) * TILES * BLOCK_P
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    pair = n * channels + c
    bias = load_vector(BIAS, c, mask_c, ACC, HAS_BIAS)
    demod = load_vector(DEMOD, pair, mask_c, ACC, HAS_DEMOD)
    style = load_vector(STYLE, pair, mask_c, ACC, HAS_STYLE)
    strength = tl.full([1], 1.0, ACC)
    if HAS_STRENGTH:
        strength = tl.load(STRENGTH).to(ACC)
    zero = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sum_bias = zero
    sum_demod = zero
    sum_strength = tl.zeros([BLOCK_P], ACC)
    sum_style = zero
    for i in range(TILES):
        p = start + i * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = p < pixels
        mask = mask_p[:, None] & mask_c[None, :]
        gz = tl.load(tile_at(GZ, n, c, p, zn, zc, zh, zw, width, SPLIT), mask=mask, other=0.0).to(ACC)
        ref = tl.load(tile_at(REF, n, c, p, xn, xc, xh, xw, width, SPLIT), mask=mask, other=0.0).to(ACC)
        noise = load_map(NOISE, n, p, mask_p, nn, nh, nw, width, SPLIT, ACC, HAS_NOISE)
        v = gz
        if HAS_STYLE:
            v = gz * style[None, :]
        if FROM_Y:
            g = pointwise_gradient_from_y(v, ref, SLOPE, GAIN, CLAMP)
            if WANT_DEMOD:
                ref = input_from_y(
                    ref, demod, noise * strength, bias, HAS_DEMOD, HAS_NOISE, HAS_BIAS, SLOPE, GAIN
                )  # fmt: skip
        else:
            pre = pre_activation(ref, demod, noise * strength, bias, HAS_DEMOD, HAS_NOISE, HAS_BIAS)
            g = pointwise_gradient(v, pre, ACT, SLOPE, GAIN, CLAMP)
            if WANT_STYLE:
                sum_style += gz * pointwise(pre, ACT, SLOPE, GAIN, CLAMP)
        if WANT_BIAS:
            sum_bias += g
        if WANT_DEMOD:
            sum_demod += g * ref
        if WANT_STRENGTH:
            sum_strength += tl.sum(g, 1) * noise
        if WANT_NOISE:
            tl.store(MAPS + (block * samples + n) * pixels + p, tl.sum(g, 1) * strength, mask=mask_p)
        if WANT_X:
            if HAS_DEMOD:
                g = g * demod[None, :]
            tl.store(tile_at(GX, n, c, p, gn, gc, gh, gw, width, SPLIT), g.to(GX.dtype.element_ty), mask=mask)
    write_sums(
        SUMS + row * channels, plane, c, mask_c, block * BLOCK_C, sum_bias, sum_demod, sum_strength, sum_style,
        WANT_BIAS, WANT_DEMOD, WANT_STRENGTH, WANT_STYLE,
    )  # fmt: skip


@triton.jit
def second(
    GZ, REF, BIAS, DEMOD, NOISE, STRENGTH, STYLE, HX, HBIAS, HDEMOD, HNOISE, HSTRENGTH, HSTYLE, GGZ, GX, SUMS, MAPS,
    samples, channels, pixels, width, chunks, blocks, plane,
    zn, zc, zh, zw, xn, xc, xh, xw, nn, nc, nh, nw, hn, hc, hh, hw, mn, mc, mh, mw, on, oc, oh, ow, gn, gc, gh, gw,
    FROM_Y: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DEMOD: tl.constexpr, HAS_NOISE: tl.constexpr,
    HAS_STRENGTH: tl.constexpr, HAS_STYLE: tl.constexpr,
    GIVEN_X: tl.constexpr, GIVEN_BIAS: tl.constexpr, GIVEN_DEMOD: tl.constexpr, GIVEN_NOISE: tl.constexpr,
    GIVEN_STRENGTH: tl.constexpr, GIVEN_STYLE: tl.constexpr,
    WANT_Z: tl.constexpr, WANT_X: tl.constexpr, WANT_BIAS: tl.constexpr, WANT_DEMOD: tl.constexpr,
    WANT_NOISE: tl.constexpr, WANT_STRENGTH: tl.constexpr, WANT_STYLE: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
    ACC: tl.constexpr, SPLIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """As `first`, for the gradients of its results along their cotangents HX … HSTYLE, as far as GIVEN.

    FROM_Y: there is no next_style and the act is piecewise linear, so that `a` is zero.
    """
    program = tl.program_id(0)
    block = (program % blocks).to(tl.int64)
    row = (program // blocks).to(tl.int64)
    n = row // chunks
    start = (row % chunks) * TILES * BLOCK_P
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < channels
    pair = n * channels + c
    strength = tl.full([1], 1.0, ACC)
    if HAS_STRENGTH:
        strength = tl.load(STRENGTH).to(ACC)
    if GIVEN_STRENGTH:
        h_strength = tl.load(HSTRENGTH).to(ACC)
    zero = tl.zeros([BLOCK_P, BLOCK_C], ACC)
    sum_bias = zero
    sum_demod = zero
    sum_strength = tl.zeros([BLOCK_P], ACC)
    sum_style = zero
    for i in range(TILES):
        p = start + i * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_p = p < pixels
        mask = mask_p[:, None] & mask_c[None, :]
        gz = tl.load(tile_at(GZ, n, c, p, zn, zc, zh, zw, width, SPLIT), mask=mask, other=0.0).to(ACC)
        ref = tl.load(tile_at(REF, n, c, p, xn, xc, xh, xw, width, SPLIT), mask=mask, other=0.0).to(ACC)
        bias = load_vector(BIAS, c, mask_c, ACC, HAS_BIAS)
        demod = load_vector(DEMOD, pair, mask_c, ACC, HAS_DEMOD)
        style = load_vector(STYLE, pair, mask_c, ACC, HAS_STYLE)
        h_bias = load_vector(HBIAS, c, mask_c, ACC, GIVEN_BIAS)
        h_demod = load_vector(HDEMOD, pair, mask_c, ACC, GIVEN_DEMOD)
        h_style = load_vector(HSTYLE, pair, mask_c, ACC, GIVEN_STYLE)
        noise = load_map(NOISE, n, p, mask_p, nn, nh, nw, width, SPLIT, ACC, HAS_NOISE)
        h_noise = load_map(HNOISE, n, p, mask_p, mn, mh, mw, width, SPLIT, ACC, GIVEN_NOISE)
        h = zero
        if GIVEN_X:
            hx = tl.load(tile_at(HX, n, c, p, hn, hc, hh, hw, width, SPLIT), mask=mask, other=0.0).to(ACC)
            h = hx
            if HAS_DEMOD:
                h = hx * demod[None, :]
        if GIVEN_BIAS:
            h += h_bias[None, :]
        if GIVEN_DEMOD:
            x = ref
            if FROM_Y:
                x = input_from_y(ref, demod, noise * strength, bias, HAS_DEMOD, HAS_NOISE, HAS_BIAS, SLOPE, GAIN)
            h += h_demod[None, :] * x
        if GIVEN_STRENGTH:
            h += (noise * h_strength)[:, None]
        if GIVEN_NOISE:
            h += (h_noise * strength)[:, None]
        v = gz
        if HAS_STYLE:
            v = gz * style[None, :]
        a = zero
        if FROM_Y:
            fh = pointwise_gradient_from_y(h, ref, SLOPE, GAIN, CLAMP)
            g = pointwise_gradient_from_y(v, ref, SLOPE, GAIN, CLAMP)
        else:
            pre = pre_activation(ref, demod, noise * strength, bias, HAS_DEMOD, HAS_NOISE, HAS_BIAS)
            fh = pointwise_gradient(h, pre, ACT, SLOPE, GAIN, CLAMP)
            g = pointwise_gradient(v, pre, ACT, SLOPE, GAIN, CLAMP)
            if ACT != "lrelu":
                a = pointwise_curvature(v * h, pre, ACT, SLOPE, GAIN, CLAMP)
            if GIVEN_STYLE:
                a += pointwise_gradient(gz * h_style[None, :], pre, ACT, SLOPE, GAIN, CLAMP)
        if WANT_Z:
            ggz = fh
            if HAS_STYLE:
                ggz = fh * style[None, :]
            if GIVEN_STYLE:
                ggz += pointwise(pre, ACT, SLOPE, GAIN, CLAMP) * h_style[None, :]
            tl.store(tile_at(GGZ, n, c, p, on, oc, oh, ow, width, SPLIT), ggz.to(GGZ.dtype.element_ty), mask=mask)
        if WANT_BIAS:
            sum_bias += a
        if WANT_DEMOD:
            sum_demod += a * ref
            if GIVEN_X:
                sum_demod += g * hx
        if WANT_STRENGTH:
            sum_strength += tl.sum(a, 1) * noise
            if GIVEN_NOISE:
                sum_strength += tl.sum(g, 1) * h_noise
        if WANT_STYLE:
            sum_style += gz * fh
        if WANT_NOISE:
            both = a * strength
            if GIVEN_STRENGTH:
                both += g * h_strength
            tl.store(MAPS + (block * samples + n) * pixels + p, tl.sum(both, 1), mask=mask_p)
        if WANT_X:
            if HAS_DEMOD:
                a = a * demod[None, :]
            if GIVEN_DEMOD:
                a += g * h_demod[None, :]
            tl.store(tile_at(GX, n, c, p, gn, gc, gh, gw, width, SPLIT), a.to(GX.dtype.element_ty), mask=mask)
    write_sums(
        SUMS + row * channels, plane, c, mask_c, block * BLOCK_C, sum_bias, sum_demod, sum_strength, sum_style,
        WANT_BIAS, WANT_DEMOD, WANT_STRENGTH, WANT_STYLE,
    )  # fmt: skip
