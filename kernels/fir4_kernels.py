"""The resampling that StyleGAN2 uses everywhere, in Triton: 4 separable taps as a blur, 2× up or 2× down, in one pass
with a pointwise chain in front of it or behind it.

    v = FRONT(x)      z = upfirdn2d(v, w⊗w)      y = BACK(z·demod[n,c])

    FRONT "none"      v = x
          "activate"  v = chain(x + bias)                           chain: clamp(act(·)·gain), pointwise_triton
          "slope"     v = x·m             and the sums over pixels Σ v, Σ x·source where unclamped, Σ v·noise
    BACK  "none"      y = z·demod
          "add"       y = z·demod + source
          "activate"  y = chain(z·demod + noise·strength + bias)
          "slope"     y = m·z             and Σ y
          "tangent"   y = m·(z·demod + add + noise·noise_add) + source·source_add where unclamped,
                      y2 = other·source_add where unclamped, and Σ other·m·z

m is the slope of the chain, piecewise linear then, told from `source`: from what the chain returned (OF_Y) or from what
it was given, before the bias. Sums are over the pixels of a program, one row of partial sums each, in a fixed order.

A program makes ROWS steps down COLS column pairs (up, blur; down: columns) × CHANNELS channels and keeps the last rows'
sums in registers. A row is read once, plus the halo of 3 rows (up, down: 2) a program; its neighbours within the row
come from the L1 cache: 5 loads for a pair of outputs (blur), 3 for 2 × 2 outputs (up: 2 × 2 taps each, no zeros),
2 × 4 for one (down). In channels_last a thread loads 16 bytes along the channels; other strides are right, but slower.
"""

import triton
import triton.language as tl

from hsrgan.kernels.pointwise_triton import limit_like, pointwise, pointwise_gradient, pointwise_gradient_from_y


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
def _unclamped(v, y, CLAMP: tl.constexpr):
    """v where the chain that returned y did not clamp, else 0."""
    if CLAMP is not None:
        v = tl.where(tl.abs(y) < limit_like(y, CLAMP), v, 0.0)
    return v


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
def _columns(row, height, width):
    """How many columns there are in a row: none in a row that does not exist."""
    return tl.where((row >= 0) & (row < height), width, 0)


@triton.jit
def _tap(x_row, s_row, col, x_w, s_w, limit, chan_ok, bias, FRONT: tl.constexpr, OF_Y: tl.constexpr,
         ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
         ACC: tl.constexpr):  # fmt: skip
    """v at columns col of the rows pointed to, and x·source where unclamped."""
    ok = ((col >= 0) & (col < limit))[:, None] & chan_ok
    v = tl.load(x_row + (col * x_w)[:, None], mask=ok, other=0.0).to(ACC)
    product = v
    if FRONT == "activate":  # the FIR pads what the chain returns: zeros, whatever the bias
        v = tl.where(ok, pointwise(v + bias, ACT, SLOPE, GAIN, CLAMP), 0.0)
    elif FRONT == "slope":
        s = tl.load(s_row + (col * s_w)[:, None], mask=ok, other=0.0).to(ACC)
        product = _unclamped(v * s, s, CLAMP)
        v = _slope(v, s, bias, OF_Y, ACT, SLOPE, GAIN, CLAMP)
    return v, product


@triton.jit
def _row(x, source, n, row, col, height, width, chan_ok, bias, weights, UP: tl.constexpr, DOWN: tl.constexpr,
         CENTRE: tl.constexpr, FRONT: tl.constexpr, OF_Y: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
         GAIN: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """One input row, filtered along it for the even and the odd output columns; v at their centre taps; products."""
    w0, w1, w2, w3 = weights
    limit = tl.where((row >= 0) & (row < height), width, 0)
    row = row.to(tl.int64)
    pointer, x_n, x_h, x_w, x_at = x
    at = pointer + n * x_n + row * x_h + x_at
    pointer, s_n, s_h, s_w, s_at = source
    s = at
    if FRONT == "slope":
        s = pointer + n * s_n + row * s_h + s_at
    v0, q0 = _tap(at, s, col, x_w, s_w, limit, chan_ok, bias, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)
    v1, q1 = _tap(at, s, col + 1, x_w, s_w, limit, chan_ok, bias, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)
    v2, q2 = _tap(at, s, col + 2, x_w, s_w, limit, chan_ok, bias, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)
    a, b, product = v0, v1, v0
    if UP == 2:
        even, odd = w0 * v0 + w2 * v1, w1 * v1 + w3 * v2
    else:
        v3, q3 = _tap(at, s, col + 3, x_w, s_w, limit, chan_ok, bias, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)
        even = w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3
        odd = even
        if DOWN == 1:
            v4, q4 = _tap(at, s, col + 4, x_w, s_w, limit, chan_ok, bias, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)
            odd = w0 * v1 + w1 * v2 + w2 * v3 + w3 * v4
            if FRONT == "slope":
                if CENTRE == 0:
                    product = q0 + q1
                elif CENTRE == 1:
                    a, b, product = v1, v2, q1 + q2
                elif CENTRE == 2:
                    a, b, product = v2, v3, q2 + q3
                else:
                    a, b, product = v3, v4, q3 + q4
    return even, odd, a, b, product


@triton.jit
def _times_noise(noise, n, row, col, a, b, height, width, ACC: tl.constexpr):
    """a·noise at columns col + b·noise at col + 1."""
    limit = _columns(row, height, width)
    row = row.to(tl.int64)
    near = _load_map(noise, n, row, col, (col >= 0) & (col < limit), ACC)
    far = _load_map(noise, n, row, col + 1, (col >= -1) & (col < limit - 1), ACC)
    return a * near + b * far


@triton.jit
def _emit(z, n, row, col, size, chan_ok, y, y2, source, other, noise, vectors, HAS_NOISE: tl.constexpr,
          HAS_Y2: tl.constexpr, BACK: tl.constexpr, OF_Y: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
          GAIN: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Store y at columns col of one output row; what is summed over its pixels is returned."""
    bias, demod, strength, add, noise_add, source_add = vectors
    height, width = size
    pixel_ok = (col >= 0) & (col < _columns(row, height, width))
    ok = pixel_ok[:, None] & chan_ok
    row = row.to(tl.int64)
    value = z * demod
    part = z
    if BACK == "activate":
        if HAS_NOISE:
            value += _load_map(noise, n, row, col, pixel_ok, ACC) * strength
        value = pointwise(value + bias, ACT, SLOPE, GAIN, CLAMP)
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
        value = _slope(value, s, bias, OF_Y, ACT, SLOPE, GAIN, CLAMP) + _unclamped(s * source_add, s, CLAMP)
        if HAS_Y2:
            _store(y2, n, row, col, _unclamped(o * source_add, s, CLAMP), ok)
    _store(y, n, row, col, value, ok)
    return part


@triton.jit
def fir4(
    X, F, Y, Y2, SOURCE, OTHER, BIAS, DEMOD, NOISE, STRENGTH, ADD, NOISE_ADD, SOURCE_ADD, SUMS,
    plane, channels, height, width, out_height, out_width, lead_y, lead_x, skip_y, skip_x, strips, blocks,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, s_n, s_c, s_h, s_w, o_n, o_c, o_h, o_w, noise_n, noise_h, noise_w,
    FIR_GAIN: tl.constexpr, FLIP: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, CENTRE: tl.constexpr,
    FRONT: tl.constexpr, BACK: tl.constexpr, OF_Y: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
    SUM_V: tl.constexpr, SUM_PRODUCT: tl.constexpr, SUM_NOISE: tl.constexpr, SUM_BACK: tl.constexpr,
    ROWS: tl.constexpr, UNROLL: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """See the top of the file. Step m's first input row is DOWN·m − lead_y, its first output row UP·m − skip_y.

    SUMS [quantities, N, strips·blocks, C], `plane` values a quantity: those of SUM_V, SUM_PRODUCT, SUM_NOISE and
    SUM_BACK that are asked for.
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
    pair = n * channels + ch
    into = SUMS if SUMS is None else SUMS + tile.to(tl.int64) * channels + ch
    bias = 0.0
    demod = 1.0
    strength = 1.0
    add = 0.0
    noise_add = 0.0
    source_add = 0.0
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
    COL_STEP: tl.constexpr = 2 if BLUR else DOWN
    OUT_STEP: tl.constexpr = 2 if BLUR else UP
    col = COL_STEP * k - lead_x
    out = OUT_STEP * k - skip_x
    weights = (w0, w1, w2, w3)
    vectors = (bias, demod, strength, add, noise_add, source_add)
    size = (out_height, out_width)
    x = (X, x_n, x_h, x_w, (ch * x_c)[None, :])
    y = (Y, y_n, y_h, y_w, (ch * y_c)[None, :])
    y2 = (Y2, y_n, y_h, y_w, (ch * y_c)[None, :])
    source = (SOURCE, s_n, s_h, s_w, (ch * s_c)[None, :])
    other = (OTHER, o_n, o_h, o_w, (ch * o_c)[None, :])
    noise = (NOISE, noise_n, noise_h, noise_w)

    row = DOWN * first - lead_y
    sum_v = tl.zeros([COLS, CHANNELS], ACC)
    sum_product = sum_v
    sum_noise = sum_v
    sum_back = sum_v
    a0, a1, a2, b0, b1, b2 = sum_v, sum_v, sum_v, sum_v, sum_v, sum_v
    for r in tl.static_range(HALO):
        even, odd, c, d, product = _row(x, source, n, row + r, col, height, width, chan_ok, bias, weights, UP, DOWN,
                                        CENTRE, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
        if BLUR:  # a0 lacks one more row, a1 two, a2 three
            a0, b0 = a1 + u2 * even, b1 + u2 * odd
            a1, b1 = a2 + u1 * even, b2 + u1 * odd
            a2, b2 = u0 * even, u0 * odd
        elif DOWN == 2:  # a0 lacks two
            a0 += (u0 if r == 0 else u1) * even
        else:  # the last two rows themselves
            a0, b0, a1, b1 = a1, b1, even, odd
        if r >= CENTRE:  # a row is counted where its centre tap is: once, in one program
            if SUM_V:
                sum_v += c + d
            if SUM_PRODUCT:
                sum_product += product
            if SUM_NOISE:
                sum_noise += _times_noise(noise, n, row + r, col + CENTRE, c, d, height, width, ACC)
    row += HALO
    for start in range(0, ROWS, UNROLL):
        for r in tl.static_range(UNROLL):
            m = start + r
            step = first + m
            at = row + DOWN * m
            even, odd, c, d, product = _row(x, source, n, at, col, height, width, chan_ok, bias, weights, UP, DOWN,
                                            CENTRE, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
            if BLUR:
                z0, z1 = a0 + u3 * even, b0 + u3 * odd
                a0, b0 = a1 + u2 * even, b1 + u2 * odd
                a1, b1 = a2 + u1 * even, b2 + u1 * odd
                a2, b2 = u0 * even, u0 * odd
                if CENTRE < 3:  # the last rows are counted by the next program
                    own = m < ROWS + CENTRE - 3
                    c, d, product = tl.where(own, c, 0.0), tl.where(own, d, 0.0), tl.where(own, product, 0.0)
                if SUM_V:
                    sum_v += c + d
                if SUM_PRODUCT:
                    sum_product += product
                if SUM_NOISE:
                    sum_noise += _times_noise(noise, n, at, col + CENTRE, c, d, height, width, ACC)
            elif DOWN == 2:
                even1, odd, c, d, product = _row(x, source, n, at + 1, col, height, width, chan_ok, bias, weights, UP,
                                                 DOWN, CENTRE, FRONT, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
                z0 = a0 + u2 * even + u3 * even1
                a0 = u0 * even + u1 * even1
            else:
                z0, z1 = u0 * a0 + u2 * a1, u0 * b0 + u2 * b1
                step = 2 * step - skip_y
                _emit(z0, n, step, out, size, chan_ok, y, y2, source, other, noise, vectors, NOISE is not None,
                      Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
                _emit(z1, n, step, out + 1, size, chan_ok, y, y2, source, other, noise, vectors, NOISE is not None,
                      Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
                z0, z1 = u1 * a1 + u3 * even, u1 * b1 + u3 * odd
                step += 1
                a0, b0, a1, b1 = a1, b1, even, odd
            part = _emit(z0, n, step, out, size, chan_ok, y, y2, source, other, noise, vectors, NOISE is not None,
                         Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
            if DOWN == 1:
                part += _emit(z1, n, step, out + 1, size, chan_ok, y, y2, source, other, noise, vectors,
                              NOISE is not None, Y2 is not None, BACK, OF_Y, ACT, SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
            if SUM_BACK:
                sum_back += part
    if SUM_V:
        tl.store(into, tl.sum(sum_v, 0), mask=ch_ok)
        into += plane
    if SUM_PRODUCT:
        tl.store(into, tl.sum(sum_product, 0), mask=ch_ok)
        into += plane
    if SUM_NOISE:
        tl.store(into, tl.sum(sum_noise, 0), mask=ch_ok)
        into += plane
    if SUM_BACK:
        tl.store(into, tl.sum(sum_back, 0), mask=ch_ok)

