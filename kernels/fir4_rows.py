"""The rows of `fir4_kernels.fir4`: loaded, through FRONT, and filtered along themselves."""

import triton
import triton.language as tl

from hsrgan.kernels.pointwise_triton import limit_like, pointwise, pointwise_gradient, pointwise_gradient_from_y


@triton.jit
def unclamped(v, y, CLAMP: tl.constexpr):
    """v where the chain that returned y did not clamp, else 0."""
    if CLAMP is not None:
        v = tl.where(tl.abs(y) < limit_like(y, CLAMP), v, 0.0)
    return v


@triton.jit
def within(i, size):
    """0 ≤ i < size, in one comparison; size ≥ 0. A size of 1 comes as a constant, which only tl.cast takes."""
    if i.dtype == tl.int64:
        ok = i.to(tl.uint64) < tl.cast(size, tl.uint64)
    else:
        ok = i.to(tl.uint32) < tl.cast(size, tl.uint32)
    return ok


@triton.jit
def columns(row, height, width):
    """How many columns there are in a row: none in a row that does not exist."""
    return tl.where(within(row, height), width, 0)


@triton.jit
def _tap(J: tl.constexpr, row, col, limit, chan_ok, bias, product, SPAN: tl.constexpr, CENTRE: tl.constexpr,
         PRODUCT: tl.constexpr, FRONT: tl.constexpr, OF_Y: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
         GAIN: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """v at columns col + J of a row; and product, plus x·source if those are centre taps: where unclamped (PRODUCT 1),
    and everywhere (2: both).

    row: pointers to x and to source at columns col, and their strides of columns.
    """
    x_at, s_at, x_w, s_w = row
    col += J
    inside = within(col, limit)
    ok = inside[:, None] & chan_ok
    v = tl.load(x_at + J * x_w, mask=ok, other=0.0).to(ACC)
    if FRONT == "activate":  # the FIR pads what the chain returns: zeros, whatever the bias
        v = pointwise(v + bias, ACT, SLOPE, GAIN, None)
        if CLAMP is None:
            v = tl.where(ok, v, 0.0)
        else:  # the clamp makes them: an instruction a column instead of one a value
            most = tl.where(inside, limit_like(tl.zeros_like(col).to(ACC), CLAMP), 0.0)[:, None]
            v = tl.minimum(v, most, propagate_nan=tl.PropagateNan.ALL)
            v = tl.maximum(v, -most, propagate_nan=tl.PropagateNan.ALL)
    elif FRONT == "slope":
        s = tl.load(s_at + J * s_w, mask=ok, other=0.0).to(ACC)
        if OF_Y:
            if CENTRE <= J and J < CENTRE + SPAN:
                some, every = product
                if PRODUCT > 0:
                    some += unclamped(v, s, CLAMP) * s
                if PRODUCT > 1:
                    every += v * s
                product = (some, every)
            v = unclamped(v, s, CLAMP)
            v = pointwise_gradient_from_y(v, s, SLOPE, GAIN, None)
        else:
            v = pointwise_gradient(v, s + bias, ACT, SLOPE, GAIN, CLAMP)
    return v, product


@triton.jit
def row_of(x, source, n, row, col, height, width, chan_ok, bias, weights, product, UP: tl.constexpr, DOWN: tl.constexpr,
         SPAN: tl.constexpr, CENTRE: tl.constexpr, PRODUCT: tl.constexpr, FRONT: tl.constexpr, OF_Y: tl.constexpr,
         ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
         ACC: tl.constexpr):  # fmt: skip
    """One input row, filtered along it for SPAN output columns side by side; v at their centre taps; product with
    theirs, if PRODUCT. Of the four that are returned the first SPAN count.
    """
    w0, w1, w2, w3 = weights
    limit = columns(row, height, width)
    row = row.to(tl.int64)
    pointer, x_n, x_h, x_w, x_at = x
    at = pointer + n * x_n + row * x_h + ((col * x_w)[:, None] + x_at)
    pointer, s_n, s_h, s_w, s_at = source
    s = at
    if FRONT == "slope":
        s = pointer + n * s_n + row * s_h + ((col * s_w)[:, None] + s_at)
    of = (at, s, x_w, s_w)
    v0, product = _tap(0, of, col, limit, chan_ok, bias, product, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT,
                        SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
    v1, product = _tap(1, of, col, limit, chan_ok, bias, product, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT,
                        SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
    v2, product = _tap(2, of, col, limit, chan_ok, bias, product, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT,
                        SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
    if UP == 2:
        h = (w0 * v0 + w2 * v1, w1 * v1 + w3 * v2, v0, v0)
        mid = h
    else:
        v3, product = _tap(3, of, col, limit, chan_ok, bias, product, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT,
                            SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
        v4, v5, v6 = v3, v3, v3
        if DOWN == 1:
            v4, product = _tap(4, of, col, limit, chan_ok, bias, product, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT,
                                SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
        if SPAN == 4:
            v5, product = _tap(5, of, col, limit, chan_ok, bias, product, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT,
                                SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
            v6, product = _tap(6, of, col, limit, chan_ok, bias, product, SPAN, CENTRE, PRODUCT, FRONT, OF_Y, ACT,
                                SLOPE, GAIN, CLAMP, ACC)  # fmt: skip
        v = (v0, v1, v2, v3, v4, v5, v6)
        h = (_filtered(v0, v1, v2, v3, weights), _filtered(v1, v2, v3, v4, weights),
             _filtered(v2, v3, v4, v5, weights), _filtered(v3, v4, v5, v6, weights))  # fmt: skip
        mid = (v[CENTRE], v[CENTRE + 1], v[CENTRE + 2 if SPAN == 4 else 0], v[CENTRE + 3 if SPAN == 4 else 0])
    return h, mid, product


@triton.jit
def _filtered(v0, v1, v2, v3, weights):
    w0, w1, w2, w3 = weights
    return w0 * v0 + w1 * v1 + w2 * v2 + w3 * v3
