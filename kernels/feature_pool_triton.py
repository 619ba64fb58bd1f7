"""Triton kernels of `feature_match`'s wide half: 1×1 convolution → ReLU → sums over the bins of the area resize, in one
pass each way, so that the hidden map (4096 channels wide) never reaches memory.

    bins[n, i, j, k] = 2^−e · Σ over the pixels p of bin (i, j) of relu(Σ_c w1[k, c]·x[n, c, p] + b1[k])

and, with dh[p, k] = (hidden > 0)·Σ over the bins holding p of dbins[n, i, j, k], made by the tile and never stored,

    dx[n, c, p] = α Σ_k dh[p, k]·w1[k, c];   dw1[k, c] = α Σ_p dh[p, k]·x[n, c, p];   db1[k] = α Σ_p dh[p, k]

The grid is never finer than the image on either axis (`feature_match` grows its prediction afterwards), so that a pixel
row belongs to one bin row or to two neighbours. A tile is NI images × R rows × WB columns, R chosen such that its rows
lie in two neighbouring bin rows at most: two sets of sums then stream over the image, nothing is computed twice and
nothing is added up by atomics. Which hidden values were positive is kept as one bit each, [N, H, bytes of a row, K]:
bit b of byte q of a chunk of WB columns is column b·WB/8 + q.
"""

import triton
import triton.language as tl


@triton.jit
def _membership(y0, chunk, q0, H, W, h, w, NI: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, JB: tl.constexpr,
                first: tl.constexpr, sets: tl.constexpr):  # fmt: skip
    """[NI·R·WB pixels, sets·NI·JB bins] → bool: is the pixel of the tile at (y0, chunk) in the bin.

    The bins are those of columns q0…q0 + JB − 1 in bin rows b + first…b + first + sets − 1, b the one that begins y0.
    """
    m = tl.arange(0, NI * R * WB)
    image, row, col = m // (R * WB), y0 + m // WB % R, chunk * WB + m % WB
    q = tl.arange(0, sets * NI * JB)
    i, j = y0 * h // H + first + q // (NI * JB), q0 + q % JB
    rows = (row[:, None] >= (i * H // h)[None, :]) & (row[:, None] < (((i + 1) * H + h - 1) // h)[None, :])
    cols = (col[:, None] >= (j * W // w)[None, :]) & (col[:, None] < (((j + 1) * W + w - 1) // w)[None, :])
    inside = (row < H) & (col < W)
    return rows & cols & inside[:, None] & (image[:, None] == (q // JB % NI)[None, :])


@triton.jit
def pool_kernel(
    x, weight, bias, bins, positive,
    N, C, H, W, K, h, w, sn, sc, sh, sw, wk, wc, scale, bin_rows, row_parts, col_parts, row_bytes,
    NI: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, JB: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    NC: tl.constexpr, SHARED: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """bins [N, h, w, K] and, if KEEP, the bits. weight [K, C], strides wk and wc; bias [K].

    Program (block of BN hidden channels; NI images, `bin_rows` bin rows, JB bin columns). NC = ⌈C/BC⌉ products make a
    tile; with NC = 1 the weights are loaded once and stay.
    """
    BM: tl.constexpr = NI * R * WB
    Q: tl.constexpr = NI * JB
    part = tl.program_id(1)
    group = part // (row_parts * col_parts)
    i0 = part // col_parts % row_parts * bin_rows
    i1 = tl.minimum(i0 + bin_rows, h)
    j0 = part % col_parts * JB
    row0, row1 = i0 * H // h, (i1 * H + h - 1) // h
    chunk0 = j0 * W // w // WB
    chunks = ((tl.minimum(j0 + JB, w) * W + w - 1) // w - 1) // WB - chunk0 + 1

    k = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, BC)
    m = tl.arange(0, BM)
    n = (group * NI + m // (R * WB)).to(tl.int64)
    q = tl.arange(0, Q)
    b = tl.load(bias + k, mask=k < K, other=0).to(ACC)
    w_at = weight + k[:, None] * wk + c[None, :] * wc
    if NC == 1:
        kept = tl.load(w_at, mask=(k < K)[:, None] & (c < C)[None, :], other=0).to(DOT)
    out = bins + ((group * NI + q // JB).to(tl.int64) * h * w + j0 + q % JB)[None, :] * K + k[:, None]
    stored = (k < K)[:, None] & ((group * NI + q // JB < N) & (j0 + q % JB < w))[None, :]

    acc = tl.zeros([BN, BM], ACC)
    here = tl.zeros([BN, Q], ACC)  # the sums of the bin row that begins the tile
    after = tl.zeros([BN, Q], ACC)  # and of the next one
    steps = (row1 - row0 + R - 1) // R * chunks
    for t in range(steps * NC):
        step = t // NC
        y0, chunk = row0 + step // chunks * R, chunk0 + step % chunks
        row, col = y0 + m // WB % R, chunk * WB + m % WB
        inside = (n < N) & (row < row1) & (col < W)
        at = n * sn + row.to(tl.int64) * sh + col.to(tl.int64) * sw
        cc = t % NC * BC + c
        tile = tl.load(x + at[:, None] + cc[None, :] * sc, mask=inside[:, None] & (cc < C)[None, :], other=0).to(DOT)
        if NC == 1:
            acc = tl.dot(kept, tl.trans(tile), input_precision=PRECISION, out_dtype=ACC)
        else:
            wt = tl.load(w_at + t % NC * BC * wc, mask=(k < K)[:, None] & (cc < C)[None, :], other=0).to(DOT)
            acc = tl.dot(wt, tl.trans(tile), acc, input_precision=PRECISION, out_dtype=ACC)
        if t % NC == NC - 1:
            acc += b[:, None]
            hidden = tl.where(acc <= 0, 0.0, acc).to(DOT)  # NaN stays, as in PyTorch's relu
            if KEEP:
                bit = tl.reshape(tl.where(acc <= 0, 0, 1), [BN, NI * R, 8, WB // 8])
                byte = tl.sum(bit << tl.arange(0, 8)[None, None, :, None], 2)
                u, v = tl.arange(0, NI * R), tl.arange(0, WB // 8)
                nu, yu = (group * NI + u // R).to(tl.int64), y0 + u % R
                spot = ((nu * H + yu) * row_bytes)[None, :, None] + (chunk * (WB // 8) + v)[None, None, :]
                ok = (k < K)[:, None, None] & ((nu < N) & (yu < row1))[None, :, None]
                tl.store(positive + spot * K + k[:, None, None], byte.to(tl.uint8), mask=ok)
            member = _membership(y0, chunk, j0, H, W, h, w, NI, R, WB, JB, 0, 1)
            here = tl.dot(hidden, member.to(DOT), here, input_precision=PRECISION, out_dtype=ACC)
            if SHARED:
                member = _membership(y0, chunk, j0, H, W, h, w, NI, R, WB, JB, 1, 1)
                after = tl.dot(hidden, member.to(DOT), after, input_precision=PRECISION, out_dtype=ACC)
            i = y0 * h // H
            if (step % chunks == chunks - 1) & (((y0 + R) * h // H > i) | (y0 + R >= row1)):
                # a part may begin with a row that also belongs to the bin row above, which is another program's
                ours = (i + 0 * q >= i0)[None, :]
                tl.store(out + i * w * K, (here * scale).to(bins.dtype.element_ty), mask=stored & ours)
                here = after
                after = tl.zeros([BN, Q], ACC)
            acc = tl.zeros([BN, BM], ACC)
    if SHARED:
        i = (row0 + (row1 - row0 - 1) // R * R) * h // H + 1
        tl.store(out + i * w * K, (here * scale).to(bins.dtype.element_ty), mask=stored & (i + 0 * q < i1)[None, :])


@triton.jit
def _as_loaded(byte, DOT: tl.constexpr):
    """byte. In fp64 behind a maximum of one: Triton takes the narrowest value that a product's operand is made of for
    its width, looks through all but such sums, and at 8 bits for 64 fails to compile.
    """
    if tl.float64 == DOT:
        byte = tl.max(byte[None], 0)
    return byte


@triton.jit
def _bits(byte, sets: tl.constexpr, WB: tl.constexpr, BK: tl.constexpr):
    """byte [sets, WB/8, BK] → bool [sets·WB, BK]."""
    wide = byte[:, None, :, :].to(tl.int32) >> tl.arange(0, 8)[None, :, None, None]
    return (tl.reshape(wide, [sets * WB, BK]) & 1) == 1


@triton.jit
def dx_kernel(
    dbins, positive, weight, alpha, dx,
    N, C, H, W, K, h, w, sn, sc, sh, sw, wk, wc, row_tiles, chunks, row_bytes,
    NI: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, JB: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, strides s·, from dbins [N, h, w, K], the bits and weight; alpha [1]. Program (BC channels; tile)."""
    BM: tl.constexpr = NI * R * WB
    Q: tl.constexpr = 2 * NI * JB
    part = tl.program_id(1)
    group, y0, chunk = part // (row_tiles * chunks), part // chunks % row_tiles * R, part % chunks
    q0 = chunk * WB * w // W
    member = _membership(y0, chunk, q0, H, W, h, w, NI, R, WB, JB, 0, 2).to(DOT)
    q = tl.arange(0, Q)
    i, j, nq = y0 * h // H + q // (NI * JB), q0 + q % JB, group * NI + q // JB % NI
    from_bins = dbins + ((nq.to(tl.int64) * h + i) * w + j)[:, None] * K
    known = (nq < N) & (i < h) & (j < w)
    u, v = tl.arange(0, NI * R), tl.arange(0, WB // 8)
    nu, yu = (group * NI + u // R).to(tl.int64), y0 + u % R
    spot = ((nu * H + yu) * row_bytes)[:, None] + (chunk * (WB // 8) + v)[None, :]
    from_bits = positive + spot[:, :, None] * K
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    acc = tl.zeros([BM, BC], ACC)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        g = tl.load(from_bins + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0).to(DOT)
        dh = tl.dot(member, g, input_precision=PRECISION, out_dtype=ACC)
        ok = ((nu < N) & (yu < H))[:, None, None] & (k < K)[None, None, :]
        byte = _as_loaded(tl.load(from_bits + k[None, None, :], mask=ok, other=0), DOT)
        dh = tl.where(_bits(byte, NI * R, WB, BK), dh, 0.0).to(DOT)
        at = weight + k[:, None] * wk + c[None, :] * wc
        wt = tl.load(at, mask=(k < K)[:, None] & (c < C)[None, :], other=0).to(DOT)
        acc = tl.dot(dh, wt, acc, input_precision=PRECISION, out_dtype=ACC)
    m = tl.arange(0, BM)
    n, row, col = (group * NI + m // (R * WB)).to(tl.int64), y0 + m // WB % R, chunk * WB + m % WB
    at = n * sn + row.to(tl.int64) * sh + col.to(tl.int64) * sw
    ok = ((n < N) & (row < H) & (col < W))[:, None] & (c < C)[None, :]
    acc *= tl.load(alpha).to(ACC)
    tl.store(dx + at[:, None] + c[None, :].to(tl.int64) * sc, acc.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def dw_kernel(
    x, dbins, positive, dw, db,
    N, C, H, W, K, h, w, sn, sc, sh, sw, row_tiles, chunks, row_bytes, tiles, tiles_a_split,
    NI: tl.constexpr, R: tl.constexpr, WB: tl.constexpr, JB: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dw [splits, K, C] and db [splits, K], each split's share of the sum over pixels. Program (BN; BC; split)."""
    BM: tl.constexpr = NI * R * WB
    Q: tl.constexpr = 2 * NI * JB
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    split = tl.program_id(2)
    m, q = tl.arange(0, BM), tl.arange(0, Q)
    u, v = tl.arange(0, NI * R), tl.arange(0, WB // 8)
    acc = tl.zeros([BN, BC], ACC)
    sums = tl.zeros([BN], ACC)
    for part in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tiles)):
        group, y0, chunk = part // (row_tiles * chunks), part // chunks % row_tiles * R, part % chunks
        q0 = chunk * WB * w // W
        i, j, nq = y0 * h // H + q // (NI * JB), q0 + q % JB, group * NI + q // JB % NI
        from_bins = dbins + ((nq.to(tl.int64) * h + i) * w + j)[None, :] * K + k[:, None]
        known = ((nq < N) & (i < h) & (j < w))[None, :] & (k < K)[:, None]
        g = tl.load(from_bins, mask=known, other=0).to(DOT)
        member = _membership(y0, chunk, q0, H, W, h, w, NI, R, WB, JB, 0, 2).to(DOT)
        dh = tl.dot(g, tl.trans(member), input_precision=PRECISION, out_dtype=ACC)
        nu, yu = (group * NI + u // R).to(tl.int64), y0 + u % R
        spot = ((nu * H + yu) * row_bytes)[None, :, None] + (chunk * (WB // 8) + v)[None, None, :]
        ok = ((nu < N) & (yu < H))[None, :, None] & (k < K)[:, None, None]
        byte = _as_loaded(tl.load(positive + spot * K + k[:, None, None], mask=ok, other=0), DOT).to(tl.int32)
        bit = tl.reshape(byte[:, :, None, :] >> tl.arange(0, 8)[None, None, :, None], [BN, BM]) & 1
        dh = tl.where(bit == 1, dh, 0.0)
        sums += tl.sum(dh, 1)
        n, row, col = (group * NI + m // (R * WB)).to(tl.int64), y0 + m // WB % R, chunk * WB + m % WB
        at = n * sn + row.to(tl.int64) * sh + col.to(tl.int64) * sw
        ok = ((n < N) & (row < H) & (col < W))[:, None] & (c < C)[None, :]
        tile = tl.load(x + at[:, None] + c[None, :].to(tl.int64) * sc, mask=ok, other=0).to(DOT)
        acc = tl.dot(dh.to(DOT), tile, acc, input_precision=PRECISION, out_dtype=ACC)
    kk = split.to(tl.int64) * K + k
    tl.store(dw + kk[:, None] * C + c[None, :], acc, mask=(k < K)[:, None] & (c < C)[None, :])
    tl.store(db + kk, sums, mask=(k < K) & (tl.program_id(1) + 0 * k == 0))
