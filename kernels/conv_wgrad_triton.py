"""A convolution's weight gradient in Triton: its kernel, and the rule by which it is cut and launched.

    P[n,o,i,a,b] = Σ_p g[n,o,p]·x[n,i,p·stride + (a, b) − padding]            p: the pixels of g
    dw[o,i,a,b] = Σ_n gs[n,o]·xs[n,i]·P
    dxs[n,i] = Σ_{o,a,b} gs[n,o]·w[o,i,a,b]·P     dgs[n,o] = Σ_{i,a,b} w[o,i,a,b]·xs[n,i]·P

A program owns [rows (a, i) × columns o] for all b and a range of pixels: k products a step, g's tile loaded once, x's k
times, a pixel apart, the second and third time out of the L1 cache (hence `.ca`). Rows run over kernel rows and input
channels together, so that 32 channels of a 3×3 kernel still fill the 64 rows which Hopper's matrix instruction takes.
With scales a program stays inside one sample and multiplies its fp32 sum, not the pixels; dxs and dgs are sums of the
same registers, so they cost no further pass over x or g. Programs' sums are added up in a fixed order afterwards.
P as a whole (N times the weights) never reaches memory.

L2 traffic of a 3×3 layer, a pixel of g and a program: BR·stride + BO channels for 6·BR·BO flops: 128 flops a byte at
64 × 128 in half precision and stride 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.conv_table import Shape, measured
from hsrgan.kernels.products import products
from hsrgan.kernels.tiles import is_nhwc, power_of_two

PROGRAMS = 264  # fewer leave some of an H200's 132 multiprocessors, two programs each, without work
# By chip: KiB of shared memory that a program of eight warps or two of four may fill; bytes of one channel that a step
# takes (64 or 32 pixels in half precision); stages at most. Others have what fits gfx942.
LIMITS = {"sm_80": (160, 64, 4), "sm_90": (224, 128, 3), "sm_100": (224, 128, 3), "sm_103": (224, 128, 3)}
SAMPLES = 2**16 - 1  # in one launch, where each has programs of its own: CUDA's limit of a grid's second axis
WORKSPACE = 2**27  # bytes of unsummed dw at most, unless one sample's share is more: samples are taken in turn


@triton.jit
def _store(acc, b: tl.constexpr, at, ok, DW, sx, so, a_column):
    """Kernel column b's share of dw."""
    if DW is not None:
        tl.store(DW + b * a_column + at, acc * sx[:, None] * so[None, :], mask=ok)


@triton.jit
def _contract(acc, b: tl.constexpr, at, ok, WEIGHT, sx, so, a_column, for_x, for_g):
    """for_x [BR] and for_g [BO] with kernel column b's share of dxs and dgs added."""
    if WEIGHT is not None:
        weighted = acc * tl.load(WEIGHT + b * a_column + at, mask=ok, other=0)
        for_x += tl.sum(weighted * so[None, :], 1)
        for_g += tl.sum(weighted * sx[:, None], 0)
    return for_x, for_g


@triton.jit(do_not_specialize=["H", "W", "h", "w", "row_patches", "patches", "a_group", "a_split", "PW", "zero"])
def wgrad_kernel(
    X, G, XS, GS, WEIGHT, DW, DXS, DGS,
    Cin, Cout, H, W, h, w, xn, xc, xh, xw, gn, gc, gh, gw,
    row_tiles, row_patches, patches, a_group, splits, a_split, PW, zero,
    PADDING: tl.constexpr, K: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr,
    VECTOR: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each split's share: DW [splits, K (b), K·Cin, Cout]; DXS [splits, column tiles, K·Cin]; DGS [splits, row tiles,
    Cout]; None: not wanted. WEIGHT [K (b), K·Cin, Cout], XS [N, Cin], GS [N, Cout] of ACC; None: ones.

    Program (tile; split), `splits` of them for each group of `a_group` patches: a sample's, or all there are where
    nothing differs between samples. A patch is BK / PW rows × PW columns of g; patches follow each other down a strip
    PW wide, so that x's rows are met again while they are in the L1 cache. VECTOR and zero: see `_launch`.
    """
    tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_tile, col_tile = tile % row_tiles, tile // row_tiles
    group = tl.program_id(1) // splits
    first = group * a_group + tl.program_id(1) % splits * a_split
    last = tl.minimum(first + a_split, (group + 1) * a_group)

    r = row_tile * BR + tl.arange(0, BR)
    o = col_tile * BO + tl.arange(0, BO)
    a, i = r // Cin, r % Cin
    rows = K * Cin
    r_ok, o_ok = r < rows, o < Cout
    p = tl.arange(0, BK)
    py, px = p // PW, p % PW
    x_at = (py[None, :] * S + a[:, None]).to(tl.int64) * xh + (px * S).to(tl.int64)[None, :] * xw
    x_at += i.to(tl.int64)[:, None] * xc
    g_at = (py.to(tl.int64) * gh + px.to(tl.int64) * gw)[:, None] + o.to(tl.int64)[None, :] * gc

    acc0 = tl.zeros([BR, BO], ACC)
    acc1, acc2 = acc0, acc0
    for step in range(first, last):
        n, patch = tl.cast(step // patches, tl.int64), step % patches
        y0, x0 = patch % row_patches * (BK // PW), patch // row_patches * PW
        wide_y, wide_x = tl.cast(y0, tl.int64), tl.cast(x0, tl.int64)
        inside = (y0 + py < h) & (x0 + px < w)
        from_g = G + n * gn + wide_y * gh + wide_x * gw
        gt = tl.load(from_g + g_at, mask=inside[:, None] & o_ok[None, :], other=0).to(DOT)
        from_x = X + n * xn + (wide_y * S - PADDING) * xh + (wide_x * S - PADDING) * xw
        if VECTOR:
            from_x += zero * VECTOR
        row = ((y0 + py) * S - PADDING)[None, :] + a[:, None]
        row_ok = inside[None, :] & r_ok[:, None] & (row >= 0) & (row < H)
        for b in tl.static_range(K):
            col = (x0 + px) * S + (b - PADDING)
            ok = row_ok & ((col >= 0) & (col < W))[None, :]
            xt = tl.load(from_x + b * xw + x_at, mask=ok, other=0, cache_modifier=".ca").to(DOT)
            if b == 0:
                acc0 = tl.dot(xt, gt, acc0, input_precision=PRECISION, out_dtype=ACC)
            elif b == 1:
                acc1 = tl.dot(xt, gt, acc1, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc2 = tl.dot(xt, gt, acc2, input_precision=PRECISION, out_dtype=ACC)

    sx, so = tl.full([BR], 1, ACC), tl.full([BO], 1, ACC)
    if XS is not None:
        sx = tl.load(XS + group.to(tl.int64) * Cin + i, mask=r_ok, other=0)
    if GS is not None:
        so = tl.load(GS + group.to(tl.int64) * Cout + o, mask=o_ok, other=0)
    at, ok = r[:, None] * Cout + o[None, :], r_ok[:, None] & o_ok[None, :]
    part = DW
    if DW is not None:
        part = DW + split * K * rows * Cout
    _store(acc0, 0, at, ok, part, sx, so, rows * Cout)
    if K == 3:
        _store(acc1, 1, at, ok, part, sx, so, rows * Cout)
        _store(acc2, 2, at, ok, part, sx, so, rows * Cout)
    for_x, for_g = tl.zeros([BR], ACC), tl.zeros([BO], ACC)
    for_x, for_g = _contract(acc0, 0, at, ok, WEIGHT, sx, so, rows * Cout, for_x, for_g)
    if K == 3:
        for_x, for_g = _contract(acc1, 1, at, ok, WEIGHT, sx, so, rows * Cout, for_x, for_g)
        for_x, for_g = _contract(acc2, 2, at, ok, WEIGHT, sx, so, rows * Cout, for_x, for_g)
    if DXS is not None:
        col_tiles = tl.num_programs(0) // row_tiles
        tl.store(DXS + (split * col_tiles + col_tile) * rows + r, for_x, mask=r_ok)
    if DGS is not None:
        tl.store(DGS + (split * row_tiles + row_tile) * Cout + o, for_g, mask=o_ok)


def blocks(x: Tensor, g: Tensor, k: int) -> dict[str, int]:
    """BR, BO, BK, warps and stages: a documented rule, not a measurement.

    At most 96 sums a thread, so that nothing spills: 64 × 128 or 128 × 64 for a 3×3 kernel, 128 × 128 for a 1×1. 128
    rows where they waste no more than 64 do, 64 beside 128 columns; as many stages as LIMITS leave room for. ieee
    products take ordinary multipliers and whole rows in registers, hence small tiles.
    """
    rows, chip = k * x.shape[1], launch.chip(x)
    if launch.kind_of(x.dtype) == "ieee":
        return {"BR": max(16, min(32, power_of_two(rows))), "BO": 32, "BK": 16, "num_warps": 4, "num_stages": 2}
    bo = max(16, min(128, power_of_two(g.shape[1])))
    br = 128 if -(-rows // 128) * 128 <= -(-rows // 64) * 64 and (k == 1 or bo < 128) else 64
    br = max(16, min(br, power_of_two(rows)))
    # 12,288 sums on four warps spill on sm_100, which reads them back from tensor memory all at once, and where every
    # value has an address of its own
    narrow = chip.startswith("sm_10") or not (is_nhwc(x) and is_nhwc(g))
    warps = 8 if k * br * bo > (2**13 if narrow else 3 * 2**12) else 4
    room, step, most = LIMITS.get(chip, (64, 64, 4))
    stages = room * 1024 // (2 if warps == 4 else 1) // (step * (k * br + bo))
    bk, stages = step // x.element_size(), max(2, min(most, stages))
    return {"BR": br, "BO": bo, "BK": bk, "num_warps": warps, "num_stages": stages}


def fits(x: Tensor, g: Tensor, k: int, stride: int, *, scaled: bool) -> bool:
    """Should this kernel run, or the library's with the scales multiplied in before? What was measured (`conv_table`),
    else a rule.

    It needs tensor cores (half precision, or fp32 with tf32 allowed), channels_last and whole 16-byte vectors of
    channels. It pays where bytes count, not flops: with 64 channels on either side, reading x once less is worth more
    than the tenth of the matrix rate by which library products are expected to be better (9·C flops a byte of x, 184
    flops in the time of a byte on an H200). And the sums of the samples must not outweigh what they are made of.
    """
    cin, cout = x.shape[1], g.shape[1]
    if launch.kind_of(x.dtype) == "ieee" or not (is_nhwc(x) and is_nhwc(g) and cin % 16 == cout % 16 == 0):
        return False
    shape = Shape.of(k, stride, False, cin, cout, x.shape[2], scaled, dw=True)
    if (row := measured(shape, x.dtype, launch.chip(x))) is not None:
        return row.run == "gemm"
    sums = (len(x) if scaled else 1) * 2 * 4 * k * k * cin * cout
    return min(cin, cout) <= 64 and sums <= x.nbytes + g.nbytes


def gradients(
    x: Tensor, g: Tensor, weight: Tensor | None, xs: Tensor | None, gs: Tensor | None, k: int, stride: int,
    padding: int, want: tuple[bool, bool, bool],
) -> list[Tensor | None]:  # fmt: skip
    """dw [Cout, Cin, k, k], dxs [N, Cin], dgs [N, Cout] in fp32 (fp64 for fp64), as far as wanted.

    weight is needed for dxs and dgs. Scales None: ones.
    """
    (n, cin), cout, size = x.shape[:2], g.shape[1], blocks(x, g, k)
    wide = torch.promote_types(x.dtype, torch.float32)
    flat = None if weight is None else weight.to(wide).permute(3, 2, 1, 0).contiguous()
    by_sample = want[1] or want[2] or xs is not None or gs is not None
    a_sample = k * k * cin * cout * wide.itemsize
    at_once = max(1, min(n, SAMPLES, WORKSPACE // a_sample if want[0] else n)) if by_sample else max(1, n)
    dw, dxs, dgs = None, [], []
    for start in range(0, max(1, n), at_once):
        part = slice(start, start + at_once)
        some = [None if s is None else s[part].to(wide).contiguous() for s in (xs, gs)]
        share, *scales = _launch(x[part], g[part], flat, *some, k, stride, padding, want, by_sample, wide, size)
        dw = share if dw is None else dw.add_(share)
        dxs.append(scales[0])
        dgs.append(scales[1])
    return [
        dw.permute(3, 2, 1, 0).contiguous() if want[0] else None,
        torch.cat(dxs) if want[1] else None,
        torch.cat(dgs) if want[2] else None,
    ]


def _launch(x, g, weight, xs, gs, k, stride, padding, want, by_sample, wide, size) -> list[Tensor | None]:
    """dw as [b, a, Cin, Cout], dxs, dgs, of as many samples as one launch may take."""
    (n, cin, height, width), (_, cout, h, w) = x.shape, g.shape
    row_tiles, col_tiles = -(-k * cin // size["BR"]), -(-cout // size["BO"])
    columns = min(size["BK"], power_of_two(w))
    row_patches = -(-h * columns // size["BK"])
    patches = row_patches * -(-w // columns)
    groups, a_group = (n, patches) if by_sample else (1, n * patches)
    most = max(1, WORKSPACE // (max(1, groups) * k * k * cin * cout * wide.itemsize))
    splits = max(1, min(a_group, most, PROGRAMS // max(1, row_tiles * col_tiles * groups)))
    a_split = -(-a_group // splits)
    splits = max(1, -(-a_group // max(1, a_split)))

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return x.new_empty(groups * splits, *shape, dtype=wide) if wanted else None

    # Triton 3.8 copies 16 bytes around the L1 cache whatever `.ca` says, but 8 bytes through it: to x, which is read k
    # times, an offset of 0 is added of which the compiler knows that it is a multiple of 8 bytes, and no more
    vector = 8 // x.element_size() if k == 3 and launch.chip(x).startswith("sm_") else 0
    dw = sums(want[0], k, k, cin, cout)
    dxs, dgs = sums(want[1], col_tiles * k, cin), sums(want[2], row_tiles, cout)
    launch.run(
        wgrad_kernel, (row_tiles * col_tiles, groups * splits), x, g, xs, gs,
        weight if want[1] or want[2] else None, dw, dxs, dgs, cin, cout, height, width, h, w, *x.stride(), *g.stride(),
        row_tiles, row_patches, patches, a_group, splits, a_split, columns, 0,
        PADDING=padding, K=k, S=stride, VECTOR=vector, **products(x), **size,
    )  # fmt: skip
    return [
        None if dw is None else dw[0] if len(dw) == 1 else dw.sum(0),
        None if dxs is None else dxs.view(n, splits * col_tiles * k, cin).sum(1),
        None if dgs is None else dgs.view(n, splits * row_tiles, cout).sum(1),
    ]
