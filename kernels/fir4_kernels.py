"""The resampling that StyleGAN2 uses everywhere, in Triton: 4 separable taps as a blur, 2× up or 2× down, in one pass
with a pointwise chain in front of it or behind it.

    v = FRONT(x)      z = upfirdn2d(v, w⊗w)      y = BACK(z·demod[n,c])

    FRONT "none"      v = x
          "activate"  v = chain(x + bias)                           chain: clamp(act(·)·gain), pointwise_triton
          "slope"     v = x·m             and the sums over pixels Σ v, Σ x·source where unclamped, Σ v·noise,
                      Σ x·source
    BACK  "none"      y = z·demod
          "add"       y = z·demod + source
          "activate"  y = chain(z·demod + noise·strength + bias), y2 = y·style
          "slope"     y = m·z             and Σ y
          "tangent"   y = m·(z·demod + add + noise·noise_add) + source·(source_add where unclamped + style),
                      y2 = other·(source_add where unclamped + style), and Σ other·m·z

m is the slope of the chain, piecewise linear then, told from `source`: from what the chain returned (OF_Y) or from what
it was given, before the bias. Sums are over the pixels of a program, one row of partial sums each, in a fixed order.

A program makes ROWS steps down COLS spans of SPAN columns (blur: 2 or 4), pairs (up) or columns (down) × CHANNELS
channels and keeps the last rows' sums in registers. A row is read once, plus the halo of 3 rows (up, down: 2) of every
program; its neighbours within the row come from the L1 cache: SPAN + 3 loads for SPAN outputs (blur), 3 for 2 × 2
outputs (up: 2 × 2 taps each, no zeros), 2 × 4 for one (down). What FRONT does is done anew at each load. In
channels_last a thread loads 8 or 16 bytes along the channels; other strides are right, but slower.
"""

import triton
import triton.language as tl

from hsrgan.kernels.fir4_rows import columns, row_of, unclamped, within
from hsrgan.kernels.pointwise_triton import pointwise, pointwise_gradient, pointwise_gradient_from_y


@triton.jit
def _slope(v, s, bias, OF_Y: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr,
           CLAMP: tl.constexpr):  # fmt: skip
    """v·m."""
    if OF_Y:
        g = pointwise_gradient_from_y(v, s, SLOPE, GAIN, CLAMP)
    else:
        g = pointwise_gradient(v, s + bias, ACT, SLOPE, GAIN, CLAMP)
    return g


@triton.jit
def _load(tensor, n, row, col, ok, ACC: tl.constexpr):
    """A tile [columns, channels] of one row. tensor: (pointer, strides of n, row, column, offsets [1, channels])."""
    pointer, t_n, t_h, t_w, channel_at = tensor
    return tl.load(pointer + n * t_n + row * t_h + (col * t_w)[:, None] + channel_at, mask=ok, other=0.0).to(ACC)


@triton.jit
def _load_map(tensor, n, row, col, ok, ACC: tl.constexpr):
    """[columns, 1] of one row of a map without channels. tensor: (pointer, strides of n, row, column)."""
    pointer, t_n, t_h, t_w = tensor
    return tl.load(pointer + n * t_n + row * t_h + col * t_w, mask=ok, other=0.0).to(ACC)[:, None]


@triton.jit
def _store(tensor, n, row, col, value, ok):
    pointer, t_n, t_h, t_w, channel_at = tensor
    at = pointer + n * t_n + row * t_h + (col * t_w)[:, None] + channel_at
    tl.store(at, value.to(pointer.dtype.element_ty), mask=ok)


@triton.jit
def _fall(a0, a1, a2, h, weights):
    """An output that lacked this row only, and the next three: a0 lacks one more row, a1 two, a2 three."""
    u0, u1, u2, u3 = weights
    return a0 + u3 * h, a1 + u2 * h, a2 + u1 * h, u0 * h


@triton.jit
def _sum_of(mid, SPAN: tl.constexpr):
    total = mid[0] + mid[1]
    if SPAN == 4:
        total += mid[2] + mid[3]
    return total


@triton.jit
def _times_noise(noise, n, row, col, mid, height, width, SPAN: tl.constexpr, ACC: tl.constexpr):
    """Σ mid·noise at SPAN columns from col on."""
    limit = columns(row, height, width)
    row = row.to(tl.int64)
    total = mid[0] * _load_map(noise, n, row, col, within(col, limit), ACC)
    for i in tl.static_range(1, SPAN):
        total += mid[i] * _load_map(noise, n, row, col + i, within(col + i, limit), ACC)
    return total


@triton.jit
def _emit(z, n, row, col, size, chan_ok, y, y2, source, other, noise, vectors, HAS_NOISE: tl.constexpr,
          HAS_Y2: tl.constexpr, BACK: tl.constexpr, OF_Y: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
          GAIN: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Store y at columns col of one output row; what is summed over its pixels is returned."""
    bias, demod, strength, add, noise_add, source_add, style = vectors
    height, width = size
    pixel_ok = within(col, columns(row, height, width))
    ok = pixel_ok[:, None] & chan_ok
    row = row.to(tl.int64)
    value = z * demod
    part = z
    if BACK == "activate":
        if HAS_NOISE:
            value += _load_map(noise, n, row, col, pixel_ok, ACC) * strength
        value = pointwise(value + bias, ACT, SLOPE, GAIN, CLAMP)
        if HAS_Y2:
            _store(y2, n, row, col, value * style, ok)
    elif BACK == "add":
        value += _load(source, n, row, col, ok, ACC)
    elif BACK == "slope":
        s = _load(source, n, row, col, ok, ACC)
        value = tl.where(ok, _slope(value, s, bias, OF_Y, ACT, SLOPE, GAIN, CLAMP), 0.0)
        part = value
    elif BACK == "tangent":
        s = _load(source, n, row, col, ok, ACC)
        o = _load(other, n, row, col, ok, ACC)
        part = z * _slope(o, s, bias, OF_Y, ACT, SLOPE, GAIN, CLAMP)
        value += add
        if HAS_NOISE:
            value += _load_map(noise, n, row, col, pixel_ok, ACC) * noise_add
        both = unclamped(tl.zeros_like(s) + source_add, s, CLAMP) + style
        value = _slope(value, s, bias, OF_Y, ACT, SLOPE, GAIN, CLAMP) + s * both
        if HAS_Y2:
            _store(y2, n, row, col, o * both, ok)
    _store(y, n, row, col, value, ok)
    return part


@triton.jit
def fir4(
    X, F, Y, Y2, SOURCE, OTHER, BIAS, DEMOD, NOISE, STRENGTH, ADD, NOISE_ADD, SOURCE_ADD, STYLE, SUMS,
    plane, channels, height, width, out_height, out_width, lead_y, lead_x, skip_y, skip_x, strips, blocks,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w, o_n, o_c, o_h, o_w, noise_n, noise_h, noise_w,
    FIR_GAIN: tl.constexpr, FLIP: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, CENTRE: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, OF_Y: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
    SUM_V: tl.constexpr, SUM_PRODUCT: tl.constexpr, SUM_NOISE: tl.constexpr, SUM_BACK: tl.constexpr,
    SUM_STYLE: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, SPAN: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """See the top of the file. Step m's first input row is DOWN·m − lead_y, its first output row UP·m − skip_y.

    SUMS [quantities, N, strips·blocks, C], `plane` values a quantity: those of SUM_V, SUM_PRODUCT, SUM_NOISE, SUM_BACK
    and SUM_STYLE (with SUM_PRODUCT only) that are asked for.
    """
    program = tl.program_id(0)
    groups = tl.cdiv(channels, CHANNELS)
    ch = (program % groups) * CHANNELS + tl.arange(0, CHANNELS)
    tile = program // groups
    n = (tile // blocks // strips).to(tl.int64)
    k = (tile % blocks) * COLS + tl.arange(0, COLS)
    first = ((tile // blocks) % strips) * ROWS
    ch_ok = ch < channels
    chan_ok = ch_ok[None, :]
    if EVEN:  # nothing to compare at every load
        chan_ok = tl.full([1, CHANNELS], True, tl.int1)
    pair = n * channels + ch
    into = SUMS if SUMS is None else SUMS + tile.to(tl.int64) * channels + ch
    bias = 0.0
    demod = 1.0
    strength = 1.0
    add = 0.0
    noise_add = 0.0
    source_add = 0.0
    style = 0.0
    if BIAS is not None:
        bias = tl.load(BIAS + ch, mask=ch_ok, other=0.0).to(ACC)[None, :]
    if DEMOD is not None:
        demod = tl.load(DEMOD + pair, mask=ch_ok, other=0.0).to(ACC)[None, :]
    if STRENGTH is not None:
        strength = tl.load(STRENGTH).to(ACC)
    if ADD is not None:
        add = tl.load(ADD + pair, mask=ch_ok, other=0.0).to(ACC)[None, :]
    if NOISE_ADD is not None:
        noise_add = tl.load(NOISE_ADD + pair, mask=ch_ok, other=0.0).to(ACC)[None, :]
    if SOURCE_ADD is not None:
        source_add = tl.load(SOURCE_ADD + pair, mask=ch_ok, other=0.0).to(ACC)[None, :]
    if STYLE is not None:
        style = tl.load(STYLE + pair, mask=ch_ok, other=0.0).to(ACC)[None, :]
    # weights of a correlation: a convolution mirrors the filter
    w0 = tl.load(F + (0 if FLIP else 3)).to(ACC)
    w1 = tl.load(F + (1 if FLIP else 2)).to(ACC)
    w2 = tl.load(F + (2 if FLIP else 1)).to(ACC)
    w3 = tl.load(F + (3 if FLIP else 0)).to(ACC)
    u0, u1, u2, u3 = w0 * FIR_GAIN, w1 * FIR_GAIN, w2 * FIR_GAIN, w3 * FIR_GAIN
    if WIDE:
        ch = ch.to(tl.int64)
        k = k.to(tl.int64)
    BLUR: tl.constexpr = UP == 1 and DOWN == 1
    HALO: tl.constexpr = 3 if BLUR else 2
    COL_STEP: tl.constexpr = SPAN if BLUR else DOWN
    OUT_STEP: tl.constexpr = SPAN if BLUR else UP
    col = COL_STEP * k - lead_x
    out = OUT_STEP * k - skip_x
    weights = (w0, w1, w2, w3)
    falling = (u0, u1, u2, u3)
    vectors = (bias, demod, strength, add, noise_add, source_add, style)
    size = (out_height, out_width)
    x = (X, x_n, x_h, x_w, (ch * x_c)[None, :])
    y = (Y, y_n, y_h, y_w, (ch * y_c)[None, :])
    y2 = (Y2, y_n, y_h, y_w, (ch * y_c)[None, :])
    source = (SOURCE, s_n, s_h, s_w, (ch * s_c)[None, :])
    other = (OTHER, o_n, o_h, o_w, (ch * o_c)[None, :])
    noise = (NOISE, noise_n, noise_h, noise_w)

    row = DOWN * first - lead_y
    sum_v = tl.zeros([COLS, CHANNELS], ACC)
    sum_product = (sum_v, sum_v)
    PRODUCT: tl.constexpr = 2 if SUM_STYLE else 1 if SUM_PRODUCT else 0
    sum_noise = sum_v
    sum_back = sum_v
    a0, a1, a2, b0, b1, b2 = sum_v, sum_v, sum_v, sum_v, sum_v, sum_v
    c0, c1, c2, d0, d1, d2 = sum_v, sum_v, sum_v, sum_v, sum_v, sum_v  # columns 2 and 3 of a SPAN of 4
    for r in tl.static_range(HALO):
        h, mid, product = row_of(x, source, n, row + r, col, height, width, chan_ok, bias, weights, sum_product, UP,
                                 DOWN, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
        if BLUR:
            _, a0, a1, a2 = _fall(a0, a1, a2, h[0], falling)
            _, b0, b1, b2 = _fall(b0, b1, b2, h[1], falling)
            if SPAN == 4:
                _, c0, c1, c2 = _fall(c0, c1, c2, h[2], falling)
                _, d0, d1, d2 = _fall(d0, d1, d2, h[3], falling)
        elif DOWN == 2:  # a0 lacks two
            a0 += (u0 if r == 0 else u1) * h[0]
        else:  # the last two rows themselves
            a0, b0, a1, b1 = a1, b1, h[0], h[1]
        if CENTRE < 3:  # a row is counted in one program, as one of its last ROWS; before the first of those in strip 0
            counted = first == 0
            if SUM_V:
                sum_v += tl.where(counted, _sum_of(mid, SPAN), 0.0)
            if SUM_PRODUCT:
                sum_product = (tl.where(counted, product[0], sum_product[0]), sum_product[1])
            if SUM_STYLE:
                sum_product = (sum_product[0], tl.where(counted, product[1], sum_product[1]))
            if SUM_NOISE:
                sum_noise += _times_noise(noise, n, row + r, col + CENTRE, mid, tl.where(counted, height, 0), width,
                                          SPAN, ACC)  # fmt: skip
    row += HALO
    for start in range(0, ROWS, UNROLL):
        for r in tl.static_range(UNROLL):
            m = start + r
            step = first + m
            at = row + DOWN * m
            h, mid, sum_product = row_of(x, source, n, at, col, height, width, chan_ok, bias, weights, sum_product, UP,
                                       DOWN, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP,
                                       ACC)  # fmt: skip
            if BLUR:
                z0, a0, a1, a2 = _fall(a0, a1, a2, h[0], falling)
                z1, b0, b1, b2 = _fall(b0, b1, b2, h[1], falling)
                if SUM_V:
                    sum_v += _sum_of(mid, SPAN)
                if SUM_NOISE:
                    sum_noise += _times_noise(noise, n, at, col + CENTRE, mid, height, width, SPAN, ACC)
            elif DOWN == 2:
                h1, _, _ = row_of(x, source, n, at + 1, col, height, width, chan_ok, bias, weights, sum_product, UP,
                                   DOWN, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
                z0 = a0 + u2 * h[0] + u3 * h1[0]
                a0 = u0 * h[0] + u1 * h1[0]
            else:
                z0, z1 = u0 * a0 + u2 * a1, u0 * b0 + u2 * b1
                step = 2 * step - skip_y
                _emit(z0, n, step, out, size, chan_ok, y, y2, source, other, noise, vectors, NOISE is not None,
                      Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
                _emit(z1, n, step, out + 1, size, chan_ok, y, y2, source, other, noise, vectors, NOISE is not None,
                      Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
                z0, z1 = u1 * a1 + u3 * h[0], u1 * b1 + u3 * h[1]
                step += 1
                a0, b0, a1, b1 = a1, b1, h[0], h[1]
            part = _emit(z0, n, step, out, size, chan_ok, y, y2, source, other, noise, vectors, NOISE is not None,
                         Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
            if DOWN == 1:
                part += _emit(z1, n, step, out + 1, size, chan_ok, y, y2, source, other, noise, vectors,
                              NOISE is not None, Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
            if SPAN == 4:
                z2, c0, c1, c2 = _fall(c0, c1, c2, h[2], falling)
                z3, d0, d1, d2 = _fall(d0, d1, d2, h[3], falling)
                part += _emit(z2, n, step, out + 2, size, chan_ok, y, y2, source, other, noise, vectors,
                              NOISE is not None, Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
                part += _emit(z3, n, step, out + 3, size, chan_ok, y, y2, source, other, noise, vectors,
                              NOISE is not None, Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
            if SUM_BACK:
                sum_back += part
    if SUM_V:
        tl.store(into, tl.sum(sum_v, 0), mask=ch_ok)
        into += plane
    if SUM_PRODUCT:
        tl.store(into, tl.sum(sum_product[0], 0), mask=ch_ok)
        into += plane
    if SUM_NOISE:
        tl.store(into, tl.sum(sum_noise, 0), mask=ch_ok)
        into += plane
    if SUM_BACK:
        tl.store(into, tl.sum(sum_back, 0), mask=ch_ok)
        into += plane
    if SUM_STYLE:
        tl.store(into, tl.sum(sum_product[1], 0), mask=ch_ok)

