"""Convolution as an implicit GEMM in Triton: no im2col in memory, the whole pointwise tail in the epilogue.

    c[n,o,q] = Σ_{tap,i} w[o,i,tap] · x[n,i,q·stride + tap − padding]·scale[n,i]
    y        = clamp(act(c·demod[n,o] + noise·strength + bias[o])·gain, ±clamp)
    z        = y + residual

A program makes a tile of `pixels` (16 columns wide, so that the nine taps find most of x in the L1 cache: `.ca`) ×
output channels of one sample. One flat loop, blocks of input channels outside and taps inside; scale meets the tile of
x in registers, so that x is stored once, unscaled; sums in fp32 (fp64 for fp64). Every tensor has its own strides, and
what lies outside of x, or beyond its channels (3, 513), is masked.

The transposed convolution of stride 2 is four convolutions of stride 1, one for each parity of the output's row and
column, of 2×2, 2×1, 1×2 and 1 taps: no multiplication by a zero. They are one launch, the largest first.

As an input gradient (g → x's; the transpose, or the mirrored weight at stride 1) the epilogue takes x besides and
gives the style's gradient too: sums Σ_q c·x, a row of partial sums a program, added up by PyTorch in a fixed order.

With a residual both y and z are written: y tells its gradients the side and the clamp, z does not. That is one pass
over the features less than a convolution and the pointwise kernel behind it, which reads again what was written.
There is no next style in the epilogue: two read what a layer of G writes, the next convolution and toRGB, each with a
style of its own, and where the table gives G's convolution to the GEMM it gives it the next one too, which takes its
style in its prologue for nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import Tail
from hsrgan.kernels.conv_table import Tile
from hsrgan.kernels.fir4_triton import empty, is_nhwc
from hsrgan.kernels.pointwise_triton import chain_of, pointwise, pre_activation
from hsrgan.kernels.products import products
from hsrgan.kernels.tiles import power_of_two

COLUMNS = 16
NO_TAIL = Tail(act="linear")


@triton.jit(do_not_specialize=["nothing"])
def conv_gemm(
    X, W, SCALE, Y, BIAS, DEMOD, NOISE, STRENGTH, REF, SUMS, Z,
    samples, inputs, outputs, height, width, out_h, out_w, tiles_x, tiles, blocks, nothing,
    xn, xc, xh, xw, wo, wi, wh, ww, yn, yc, yh, yw, nn, nh, nw, rn, rc, rh, rw,
    K: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr, FLIP: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GAIN: tl.constexpr, CLAMP: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """BM pixels, in rows of BW, of BN channels of Y. TRANSPOSED: K is 3, STRIDE 2 and PAD 0.

    REF has the size of Y: with SUMS what c is multiplied with, with Z the residual. nothing is 0, which the compiler
    must not know: with VECTOR, x is then copied in 8 bytes (`vector`).
    """
    program = tl.program_id(0)
    block = program % blocks
    tile = program // blocks % tiles
    sample = program // blocks // tiles
    n = (sample % samples).to(tl.int64)
    odd_y = sample // samples // 2  # 0 unless TRANSPOSED
    odd_x = sample // samples % 2
    m = tl.arange(0, BM)
    row = tile // tiles_x * (BM // BW) + m // BW
    col = tile % tiles_x * BW + m % BW
    co = block * BN + tl.arange(0, BN)
    co_ok = co < outputs
    if WIDE:
        row = row.to(tl.int64)
        col = col.to(tl.int64)
        co = co.to(tl.int64)

    if TRANSPOSED:  # output (2·row + odd_y, 2·col + odd_x) takes the taps of its parity
        taps_x = 2 - odd_x
        taps = (2 - odd_y) * taps_x
        top, left = row, col
    else:
        taps_x = K
        taps = K * K
        top, left = row * STRIDE - PAD, col * STRIDE - PAD
    x_at = X + n * xn + (top * xh + left * xw)[:, None]
    if VECTOR is not None:
        x_at += nothing * VECTOR
    w_at = W + (co * wo)[None, :]
    acc = tl.zeros([BM, BN], ACC)
    for step in range(tl.cdiv(inputs, BK) * taps):
        ci = step // taps * BK + tl.arange(0, BK)
        ci_ok = ci < inputs
        if WIDE:
            ci = ci.to(tl.int64)
        tap = step % taps
        dy, dx = tap // taps_x, tap % taps_x
        if TRANSPOSED:
            ty, tx = 2 * dy + odd_y, 2 * dx + odd_x
            dy, dx = -dy, -dx
        elif FLIP:
            ty, tx = K - 1 - dy, K - 1 - dx
        else:
            ty, tx = dy, dx
        inside = (top + dy >= 0) & (top + dy < height) & (left + dx >= 0) & (left + dx < width)
        a = tl.load(
            x_at + (dy * xh + dx * xw) + (ci * xc)[None, :], mask=inside[:, None] & ci_ok[None, :], other=0.0,
            cache_modifier=".ca",
        ).to(DOT)  # fmt: skip
        b = tl.load(
            w_at + (ty * wh + tx * ww) + (ci * wi)[:, None], mask=ci_ok[:, None] & co_ok[None, :], other=0.0
        ).to(DOT)
        if SCALE is not None:
            a = a * tl.load(SCALE + n * inputs + ci, mask=ci_ok, other=0.0).to(DOT)[None, :]
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)

    if TRANSPOSED:
        row, col = 2 * row + odd_y, 2 * col + odd_x
    row_ok = (row < out_h) & (col < out_w)
    ok = row_ok[:, None] & co_ok[None, :]
    pair = n * outputs + co
    ref_at = REF
    if REF is not None:
        ref_at += n * rn + (row * rh + col * rw)[:, None] + (co * rc)[None, :]
    if SUMS is not None:
        ref = tl.load(ref_at, mask=ok, other=0.0).to(ACC)
        row_of_sums = sample.to(tl.int64) * tiles + tile
        tl.store(SUMS + row_of_sums * outputs + co, tl.sum(acc * ref, 0), mask=co_ok)
    demod = co
    if DEMOD is not None:
        demod = tl.load(DEMOD + pair, mask=co_ok, other=0.0).to(ACC)
    shift = row
    if NOISE is not None:
        shift = tl.load(NOISE + n * nn + row * nh + col * nw, mask=row_ok, other=0.0).to(ACC)
        if STRENGTH is not None:
            shift = shift * tl.load(STRENGTH).to(ACC)
    bias = co
    if BIAS is not None:
        bias = tl.load(BIAS + co, mask=co_ok, other=0.0).to(ACC)
    p = pre_activation(acc, demod, shift, bias, DEMOD is not None, NOISE is not None, BIAS is not None)
    y = pointwise(p, ACT, SLOPE, GAIN, CLAMP)
    y_at = n * yn + (row * yh + col * yw)[:, None] + (co * yc)[None, :]
    tl.store(Y + y_at, y.to(Y.dtype.element_ty), mask=ok)
    if Z is not None:
        z = y + tl.load(ref_at, mask=ok, other=0.0).to(ACC)
        tl.store(Z + y_at, z.to(Z.dtype.element_ty), mask=ok)


def vector(x: Tensor, k: int) -> int | None:
    """How many elements of x an asynchronous copy takes on NVIDIA, where x is read again for every tap.

    Copies of 16 bytes go past the L1 cache whatever the cache modifier says (Triton 3.8; later ones heed it), and nine
    taps then read 9 times x from the L2: at 1024² and 32 channels 4.8 GB, 0.9 ms at 5.5 TB/s, where x and y take 0.25
    ms of memory's time. Copies of 8 bytes pass through the L1.
    """
    return 8 // x.itemsize if k > 1 and x.itemsize <= 4 and not launch.chip(x).startswith("gfx") else None


def launch_gemm(
    x: Tensor,
    w: Tensor,
    size: tuple[int, int],
    tile: Tile,
    *,
    stride: int,
    padding: int,
    transposed: bool,
    scale: Tensor | None = None,
    tail: Tail = NO_TAIL,
    ref: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, also): the convolution of x·scale with w and its tail, `size` pixels [N, Cout, *size], in the format of x.

    also: Σ_q c·ref [N, Cout] where a ref [N, Cout, …] is given, z where the tail has a residual, else None. No tail has
    a next style. w [Cout, Cin, k, k], or [Cin, Cout, k, k] for the transpose, of x's dtype.
    """
    (samples, inputs, height, width), k = x.shape, w.shape[-1]
    outputs = w.shape[1] if transposed else w.shape[0]
    by_phases = transposed and stride == 2
    launch.check(not by_phases or (k == 3 and padding == 0), "the transpose of stride 2 is for 3×3 without padding")
    y = empty(x, samples, outputs, *size, nhwc=is_nhwc(x))
    rows, columns = ((n + 1) // 2 for n in size) if by_phases else size
    across = min(COLUMNS, power_of_two(columns))
    pixels = max(16, min(tile.pixels, across * power_of_two(rows)))
    tiles_x, tiles_y = -(-columns // across), -(-rows // (pixels // across))
    bn, bk = (max(16, min(most, power_of_two(c))) for most, c in ((tile.outputs, outputs), (tile.inputs, inputs)))
    tiles, blocks, phases = tiles_x * tiles_y, -(-outputs // bn), 4 if by_phases else 1
    launch.check(tail.next_style is None and (ref is None or tail.residual is None), "a tail for another kernel")
    sums = None
    z = None if tail.residual is None else torch.empty_like(y)
    if ref is not None:
        wide_type = torch.promote_types(x.dtype, torch.float32)
        sums = torch.empty(phases, samples, tiles, outputs, dtype=wide_type, device=x.device)
    beside = tail.residual if ref is None else ref
    noise_strides = (0, 0, 0)
    if tail.noise is not None:
        noise_strides = (tail.noise.stride(0) if len(tail.noise) > 1 else 0, *tail.noise.stride()[2:])
    reach = max(
        abs(t.stride(1)) * t.shape[1] + t.stride(2) * (t.shape[2] + 64) + t.stride(3) * (t.shape[3] + 64)
        for t in (x, w, y, beside) if t is not None
    )  # fmt: skip
    out, into = (1, 0) if transposed else (0, 1)
    launch.run(
        conv_gemm, (phases * samples * tiles * blocks,),
        x, w, _dense(scale), y, _dense(tail.bias), _dense(tail.demod), tail.noise, tail.strength, beside, sums, z,
        samples, inputs, outputs, height, width, *size, tiles_x, tiles, blocks, 0,
        *x.stride(), w.stride(out), w.stride(into), *w.stride()[2:], *y.stride(), *noise_strides,
        *((0,) * 4 if beside is None else beside.stride()),
        K=k, STRIDE=1 if transposed else stride, PAD=k - 1 - padding if transposed else padding,
        TRANSPOSED=by_phases, FLIP=transposed, **chain_of(tail, x.dtype),
        BM=pixels, BW=across, BN=bn, BK=bk, **products(x), WIDE=reach >= 2**31, VECTOR=vector(x, k),
        num_warps=tile.warps, num_stages=tile.stages,
        registers=168 if bn > bk == 32 else None,  # 32 → 64 channels: left alone, ptxas spills 8 bytes for sm_100
    )  # fmt: skip
    return y, z if sums is None else sums.sum((0, 2))


def _dense(t: Tensor | None) -> Tensor | None:
    """A small tensor side by side in memory."""
    return None if t is None else t.contiguous()
