"""The kernels of `demodulation_triton`, which says what they compute. Small tensors are contiguous; a weight, and what
has its shape, has three strides: of output, input and tap.

A tile of weights is [outputs, inputs, taps], so that both formats are read in whole lines; a sum over samples or inputs
is taken of [samples, outputs, inputs].
"""

import triton
import triton.language as tl


@triton.jit
def _weights(W, o, i, o_ok, i_ok, w_o, w_i, w_t, K: tl.constexpr, T: tl.constexpr):
    """(where a tile's values lie, which of them there are)."""
    t = tl.arange(0, T)
    at = W + (o * w_o)[:, None, None] + (i * w_i)[None, :, None] + (t * w_t)[None, None, :]
    return at, (o_ok[:, None] & i_ok[None, :])[:, :, None] & (t < K * K)[None, None, :]


@triton.jit
def _matrix(M, r, c, r_ok, c_ok, columns, ACC: tl.constexpr):
    """Rows r and columns c of a matrix; 0 beyond it."""
    return tl.load(M + r[:, None] * columns + c[None, :], mask=r_ok[:, None] & c_ok[None, :], other=0.0).to(ACC)


@triton.jit
def _store(M, r, c, r_ok, c_ok, columns, value):
    at = M + r[:, None] * columns + c[None, :]
    tl.store(at, value.to(M.dtype.element_ty), mask=r_ok[:, None] & c_ok[None, :])


@triton.jit
def _factor(M, r, ok, LENGTH: tl.constexpr, ACC: tl.constexpr):
    """One by the maxima r; ones where nothing is normalised and beyond the last."""
    factor = tl.full([LENGTH], 1.0, ACC)
    if M is not None:
        factor = factor / tl.load(M + r, mask=ok, other=1.0).to(ACC)
    return factor


@triton.jit
def _slope(G, D, n, o, n_ok, o_ok, outputs, ACC: tl.constexpr):
    """u = −gd·d³ [samples, outputs]; 0 beyond."""
    d = _matrix(D, n, o, n_ok, o_ok, outputs, ACC)
    return -_matrix(G, n, o, n_ok, o_ok, outputs, ACC) * d * d * d


@triton.jit
def _over_samples(G, D, X, Y, YMAX, o, i, o_ok, i_ok, samples, outputs, inputs, BO: tl.constexpr, BI: tl.constexpr,
                  BN: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Σ_n u·x·y/ymax [outputs, inputs]."""
    total = tl.zeros([BO, BI], ACC)
    for start in range(0, samples, BN):
        n = start + tl.arange(0, BN)
        n_ok = n < samples
        u = _slope(G, D, n, o, n_ok, o_ok, outputs, ACC)
        xy = _matrix(X, n, i, n_ok, i_ok, inputs, ACC) * _matrix(Y, n, i, n_ok, i_ok, inputs, ACC)
        xy = xy * _factor(YMAX, n, n_ok, BN, ACC)[:, None]
        total += tl.sum(u[:, :, None] * xy[:, None, :], 0)
    return total


@triton.jit
def modulate(
    W, STYLE, CAST, S, D, E, WMAX, SMAX, samples, outputs, inputs, w_o, w_i, w_t, c_o, c_i, c_t, EPS: tl.constexpr,
    K: tl.constexpr, T: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """BO outputs of CAST, E and D; the first program writes S and SMAX. WMAX, SMAX and S are None: not normalised."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    o_ok = o < outputs
    m = tl.full([BO], 1.0, ACC)
    if WMAX is not None:
        top = tl.zeros([BO, BI], ACC)
        for block in range(BLOCKS):
            i = block * BI + tl.arange(0, BI)
            at, ok = _weights(W, o, i, o_ok, i < inputs, w_o, w_i, w_t, K, T)
            top = tl.maximum(top, tl.max(tl.abs(tl.load(at, mask=ok, other=0.0).to(ACC)), 2))
        m = tl.max(top, 1) * tl.sqrt(tl.full([BO], K * K, ACC) * inputs)
        tl.store(WMAX + o, m.to(WMAX.dtype.element_ty), mask=o_ok)
        m = 1.0 / tl.where(o_ok, m, 1.0)

    energy = tl.zeros([BO, BI], ACC)
    for block in range(BLOCKS):
        i = block * BI + tl.arange(0, BI)
        i_ok = i < inputs
        at, ok = _weights(W, o, i, o_ok, i_ok, w_o, w_i, w_t, K, T)
        w = tl.load(at, mask=ok, other=0.0).to(ACC) * m[:, None, None]
        energy = tl.sum(w * w, 2)
        _store(E, o, i, o_ok, i_ok, inputs, energy)
        at, ok = _weights(CAST, o, i, o_ok, i_ok, c_o, c_i, c_t, K, T)
        tl.store(at, w.to(CAST.dtype.element_ty), mask=ok)

    for start in range(0, samples, BN):
        n = start + tl.arange(0, BN)
        n_ok = n < samples
        s = tl.full([BN], 1.0, ACC)
        if SMAX is not None:
            top_s = tl.zeros([BN, BI], ACC)
            for block in range(BLOCKS):
                i = block * BI + tl.arange(0, BI)
                top_s = tl.maximum(top_s, tl.abs(_matrix(STYLE, n, i, n_ok, i < inputs, inputs, ACC)))
            s = tl.max(top_s, 1)
            tl.store(SMAX + n, s.to(SMAX.dtype.element_ty), mask=n_ok & (tl.program_id(0) == 0))
            s = 1.0 / tl.where(n_ok, s, 1.0)
        total = tl.full([BN, BO], EPS, ACC)
        for block in range(BLOCKS):
            i = block * BI + tl.arange(0, BI)
            i_ok = i < inputs
            style = _matrix(STYLE, n, i, n_ok, i_ok, inputs, ACC) * s[:, None]
            if S is not None:
                _store(S, n, i, n_ok & (tl.program_id(0) == 0), i_ok, inputs, style)
            if BLOCKS > 1:  # once more from the weights: what this program has stored it must not read back
                at, ok = _weights(W, o, i, o_ok, i_ok, w_o, w_i, w_t, K, T)
                w = tl.load(at, mask=ok, other=0.0).to(ACC) * m[:, None, None]
                energy = tl.sum(w * w, 2)
            total += tl.sum((style * style)[:, None, :] * energy[None, :, :], 2)
        _store(D, n, o, n_ok, o_ok, outputs, tl.rsqrt(total))


@triton.jit
def columns(
    ADD, P, G, D, E, Q, C, SMAX, OUT, DIVIDED, samples, outputs, inputs,
    BN: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """OUT = (ADD + P·(u@E)) / SMAX + Q·(u@C), DIVIDED = P / SMAX, all [samples, inputs]; None: left out."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i_ok, n_ok = i < inputs, n < samples
    by_e = tl.zeros([BN, BO, BI], ACC)
    by_c = by_e
    for start in range(0, outputs, BO):
        o = start + tl.arange(0, BO)
        o_ok = o < outputs
        u = _slope(G, D, n, o, n_ok, o_ok, outputs, ACC)[:, :, None]
        by_e += u * _matrix(E, o, i, o_ok, i_ok, inputs, ACC)[None, :, :]
        if C is not None:
            by_c += u * _matrix(C, o, i, o_ok, i_ok, inputs, ACC)[None, :, :]
    s = _factor(SMAX, n, n_ok, BN, ACC)[:, None]
    out = tl.zeros([BN, BI], ACC)
    if P is not None:
        p = _matrix(P, n, i, n_ok, i_ok, inputs, ACC)
        out = p * tl.sum(by_e, 1)
        if DIVIDED is not None:
            _store(DIVIDED, n, i, n_ok, i_ok, inputs, p * s)
    if ADD is not None:
        out += _matrix(ADD, n, i, n_ok, i_ok, inputs, ACC)
    out = out * s
    if C is not None:
        out += _matrix(Q, n, i, n_ok, i_ok, inputs, ACC) * tl.sum(by_c, 1)
    if OUT is not None:
        _store(OUT, n, i, n_ok, i_ok, inputs, out)


@triton.jit
def rows(
    A, GE, G, D, S, W, WMAX, GW, samples, outputs, inputs, a_o, a_i, a_t, w_o, w_i, w_t, g_o, g_i, g_t,
    K: tl.constexpr, T: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """GW = (A + ŵ·(Σ_n u·ŝ² + 2·GE)) / WMAX, of BO outputs and BI inputs; A, GE None: left out."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    o_ok, i_ok = o < outputs, i < inputs
    factor = _over_samples(G, D, S, S, None, o, i, o_ok, i_ok, samples, outputs, inputs, BO, BI, BN, ACC)
    if GE is not None:
        factor += 2.0 * _matrix(GE, o, i, o_ok, i_ok, inputs, ACC)
    m = _factor(WMAX, o, o_ok, BO, ACC)[:, None, None]
    at, ok = _weights(W, o, i, o_ok, i_ok, w_o, w_i, w_t, K, T)
    value = tl.load(at, mask=ok, other=0.0).to(ACC) * m * factor[:, :, None]
    if A is not None:
        at, ok = _weights(A, o, i, o_ok, i_ok, a_o, a_i, a_t, K, T)
        value += tl.load(at, mask=ok, other=0.0).to(ACC)
    at, ok = _weights(GW, o, i, o_ok, i_ok, g_o, g_i, g_t, K, T)
    tl.store(at, (value * m).to(GW.dtype.element_ty), mask=ok)


@triton.jit
def second_rows(
    HW, HS, GE, G, D, E, S, W, WMAX, SMAX, FOR_A, FOR_GE, FOR_G, FOR_W, FOR_D, FOR_E, samples, outputs, inputs,
    h_o, h_i, h_t, w_o, w_i, w_t, a_o, a_i, a_t, g_o, g_i, g_t,
    K: tl.constexpr, T: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Of BO outputs: what the cotangents HW of the weight's gradient and HS of the style's, either of them None, give
    for A, GE, G, the weight, D and E, as far as they are not None."""
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    o_ok = o < outputs
    m = _factor(WMAX, o, o_ok, BO, ACC)[:, None, None]
    inner = tl.zeros([BO, BI], ACC)
    for block in range(BLOCKS):
        i = block * BI + tl.arange(0, BI)
        i_ok = i < inputs
        if HW is not None:
            at, ok = _weights(HW, o, i, o_ok, i_ok, h_o, h_i, h_t, K, T)
            h = tl.load(at, mask=ok, other=0.0).to(ACC) * m
            at, ok = _weights(W, o, i, o_ok, i_ok, w_o, w_i, w_t, K, T)
            inner = tl.sum(h * tl.load(at, mask=ok, other=0.0).to(ACC) * m, 2)
            if FOR_GE is not None:
                _store(FOR_GE, o, i, o_ok, i_ok, inputs, 2.0 * inner)
            if FOR_A is not None:
                at, ok = _weights(FOR_A, o, i, o_ok, i_ok, a_o, a_i, a_t, K, T)
                tl.store(at, h.to(FOR_A.dtype.element_ty), mask=ok)
            if FOR_W is not None:
                factor = _over_samples(G, D, S, S, None, o, i, o_ok, i_ok, samples, outputs, inputs, BO, BI, BN, ACC)
                if GE is not None:
                    factor += 2.0 * _matrix(GE, o, i, o_ok, i_ok, inputs, ACC)
                at, ok = _weights(FOR_W, o, i, o_ok, i_ok, g_o, g_i, g_t, K, T)
                tl.store(at, (h * factor[:, :, None] * m).to(FOR_W.dtype.element_ty), mask=ok)
        if FOR_E is not None:
            value = _over_samples(G, D, S, HS, SMAX, o, i, o_ok, i_ok, samples, outputs, inputs, BO, BI, BN, ACC)
            _store(FOR_E, o, i, o_ok, i_ok, inputs, value)

    if FOR_G is not None or FOR_D is not None:
        for start in range(0, samples, BN):
            n = start + tl.arange(0, BN)
            n_ok = n < samples
            t = tl.zeros([BN, BO], ACC)
            for block in range(BLOCKS):
                i = block * BI + tl.arange(0, BI)
                i_ok = i < inputs
                s = _matrix(S, n, i, n_ok, i_ok, inputs, ACC)
                if HS is not None:
                    tangent = s * _matrix(HS, n, i, n_ok, i_ok, inputs, ACC)
                    tangent = tangent * _factor(SMAX, n, n_ok, BN, ACC)[:, None]
                    t += tl.sum(tangent[:, None, :] * _matrix(E, o, i, o_ok, i_ok, inputs, ACC)[None, :, :], 2)
                if HW is not None:
                    if BLOCKS > 1:
                        at, ok = _weights(HW, o, i, o_ok, i_ok, h_o, h_i, h_t, K, T)
                        h = tl.load(at, mask=ok, other=0.0).to(ACC) * m
                        at, ok = _weights(W, o, i, o_ok, i_ok, w_o, w_i, w_t, K, T)
                        inner = tl.sum(h * tl.load(at, mask=ok, other=0.0).to(ACC) * m, 2)
                    t += tl.sum((s * s)[:, None, :] * inner[None, :, :], 2)
            d = _matrix(D, n, o, n_ok, o_ok, outputs, ACC)
            if FOR_G is not None:
                _store(FOR_G, n, o, n_ok, o_ok, outputs, -d * d * d * t)
            if FOR_D is not None:
                g = _matrix(G, n, o, n_ok, o_ok, outputs, ACC)
                _store(FOR_D, n, o, n_ok, o_ok, outputs, -3.0 * g * d * d * t)
