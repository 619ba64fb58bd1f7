"""`feature_match` on a GPU: how its Triton kernels are cut and launched, and the autograd Function around them.

Sums over bins (feature_pool_triton) → second convolution, a matrix product of the library's on N·h'·w' rows → distance
and its gradient (feature_distance_triton). The product is the library's because fusing it with the distance would save
one pass over its result alone (5 MB at the reference size, about 2 µs of an H200's bandwidth), and the cosine needs whole
rows of it, which a tile does not hold.
"""

import math
import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import SQRT2
from hsrgan.kernels.feature_distance_triton import distance_and_gradient
from hsrgan.kernels.feature_pool_triton import dw_kernel, dx_kernel, pool_kernel

PROGRAMS = 128  # a grid smaller than this leaves multiprocessors idle (an H200 has 132, an A100 108), so it is split
MEMBERS = 64  # at most so many (image, bin column) pairs in a tile: the width of the pooling product


@dataclass(frozen=True)
class Tiles:
    """How an image of H×W pixels and its grid of h×w bins are cut: the constants of the kernels above."""

    images: int  # NI
    rows: int  # R
    columns: int  # WB
    bins: int  # JB
    chunks: int  # of WB columns in a row

    @staticmethod
    def of(n: int, size: tuple[int, int], grid: tuple[int, int], pixels: int, *, whole_bins: bool) -> "Tiles":
        """At most `pixels` of them a tile. whole_bins: JB bin columns with all their pixels; else those of WB columns."""
        (height, width), (h, w) = size, grid
        columns = min(128, max(16, triton.next_power_of_2(width)))
        while columns > 16 and _bins_in(columns, width, w) > 32:
            columns //= 2  # never depends on `pixels`: the bits are laid out by it
        bins = min(32, triton.next_power_of_2(w)) if whole_bins else triton.next_power_of_2(_bins_in(columns, width, w))
        rows = images = 1
        while 2 * rows <= height // h and 2 * rows * columns <= pixels:
            rows *= 2
        while images < n and 2 * images * rows * columns <= pixels and 2 * images * bins <= MEMBERS:
            images *= 2
        return Tiles(images, rows, columns, max(bins, 16 // images), -(-width // columns))

    @property
    def constants(self) -> dict[str, int]:
        return {"NI": self.images, "R": self.rows, "WB": self.columns, "JB": self.bins}


def _bins_in(columns: int, width: int, w: int) -> int:
    """The most bins of w over `width` pixels that any aligned chunk of so many columns touches."""
    starts = range(0, width, columns)
    return max(-(-min(s + columns, width) * w // width) - s * w // width for s in starts)


def precision(x: Tensor) -> dict[str, object]:
    """The constants ACC, DOT and PRECISION: dtype of sums, of a product's operands, and its mode for fp32."""
    acc = tl.float64 if x.dtype == torch.float64 else tl.float32
    dot = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16}.get(x.dtype, tl.bfloat16)
    if dot == tl.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        dot = tl.float32  # the interpreter's bf16 products are garbage
    return {"ACC": acc, "DOT": dot, "PRECISION": "tf32" if launch.tf32_allowed() else "ieee"}


@dataclass(frozen=True)
class Shape:
    """The numbers that all three kernels take."""

    n: int
    c: int
    size: tuple[int, int]
    k: int
    grid: tuple[int, int]

    def arguments(self, x: Tensor) -> tuple[int, ...]:
        return self.n, self.c, *self.size, self.k, *self.grid, *x.stride()


def pool(x: Tensor, w1: Tensor, b1: Tensor, grid: tuple[int, int], scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    """(scale·Σ over each bin of relu(w1 ⋆ x + b1) [N, h, w, K] of x's dtype, the bits). w1 [K, C] of x's dtype."""
    n, c, *size = x.shape
    shape = Shape(n, c, tuple(size), len(w1), grid)
    (height, width), (h, w), half = size, grid, x.element_size() == 2
    tiles = Tiles.of(n, shape.size, grid, 128 if half else 64, whole_bins=True)
    block_k, block_c = (128, 64) if half else (64, 16)
    if half and c <= 256:
        block_c = max(16, triton.next_power_of_2(c))
    bins = x.new_empty(n, h, w, shape.k)
    row_bytes = tiles.chunks * tiles.columns // 8
    positive = x.new_empty((n, height, row_bytes, shape.k) if keep else (1,), dtype=torch.uint8)
    blocks, groups, col_parts = -(-shape.k // block_k), -(-n // tiles.images), -(-w // tiles.bins)
    row_parts = max(1, min(h, PROGRAMS // max(1, blocks * groups * col_parts)))
    bin_rows = -(-h // row_parts)
    row_parts = -(-h // bin_rows)
    launch.run(
        pool_kernel, (blocks, groups * row_parts * col_parts), x, w1, b1, bins, positive, *shape.arguments(x), scale,
        bin_rows, row_parts, col_parts, row_bytes, **tiles.constants, BN=block_k, BC=block_c, NC=-(-c // block_c),
        SHARED=height % h != 0 or height // h % tiles.rows != 0, KEEP=keep, **precision(x),
        num_warps=8 if half else 4, num_stages=2,
    )  # fmt: skip
    return bins, positive


def pool_dx(x: Tensor, dbins: Tensor, positive: Tensor, w1: Tensor, alpha: Tensor) -> Tensor:
    """The gradient of x from that of the bins; everything scaled by alpha [1]."""
    n, c, *size = x.shape
    grid = (dbins.shape[1], dbins.shape[2])
    shape, half = Shape(n, c, tuple(size), len(w1), grid), x.element_size() == 2
    tiles = Tiles.of(n, shape.size, grid, 128 if half else 64, whole_bins=False)
    block_c, block_k = (min(256, max(16, triton.next_power_of_2(c))), 64) if half else (64, 16)
    dx = torch.empty_like(x)
    row_tiles = -(-size[0] // tiles.rows)
    programs = -(-n // tiles.images) * row_tiles * tiles.chunks
    launch.run(
        dx_kernel, (-(-c // block_c), programs), dbins, positive, w1, alpha, dx, *shape.arguments(dx), row_tiles,
        tiles.chunks, positive.shape[2], **tiles.constants, BC=block_c, BK=block_k, **precision(x),
        num_warps=8 if half else 4, num_stages=2,
    )  # fmt: skip
    return dx


def pool_dw(x: Tensor, dbins: Tensor, positive: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of w1 [K, C] and b1 [K], in fp32 (fp64 for fp64), from that of the bins; scaled by alpha [1]."""
    n, c, *size = x.shape
    _, h, w, k = dbins.shape
    shape, half = Shape(n, c, tuple(size), k, (h, w)), x.element_size() == 2
    tiles = Tiles.of(n, shape.size, (h, w), 64, whole_bins=False)
    block_k, block_c = (128, min(256, max(16, triton.next_power_of_2(c)))) if half else (64, 64)
    blocks, row_tiles = (-(-k // block_k), -(-c // block_c)), -(-size[0] // tiles.rows)
    programs = -(-n // tiles.images) * row_tiles * tiles.chunks
    a_split = max(1, -(-programs // max(1, PROGRAMS // (blocks[0] * blocks[1]))))
    splits = -(-programs // a_split)
    dtype = alpha.dtype
    dw, db = x.new_empty(splits, k, c, dtype=dtype), x.new_empty(splits, k, dtype=dtype)
    launch.run(
        dw_kernel, (*blocks, splits), x, dbins, positive, dw, db, *shape.arguments(x), row_tiles, tiles.chunks,
        positive.shape[2], programs, a_split, **tiles.constants, BN=block_k, BC=block_c, **precision(x),
        num_warps=8 if half else 4, num_stages=2,
    )  # fmt: skip
    return (dw[0] if splits == 1 else dw.sum(0)).mul_(alpha), db.sum(0).mul_(alpha)


class _Match(torch.autograd.Function):
    """The distance with its gradient to the sums; kept: they (N·h'·w'·K values) and a bit a hidden value. First order."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, target, distance):
        n, _, height, width = x.shape
        grid = (min(height, target.shape[2]), min(width, target.shape[3]))
        keep = any(ctx.needs_input_grad[:5])
        # powers of two, exact: sums of many pixels, and gradients of many rows, stay within half precision's range
        down = 0.5 ** round(math.log2(height * width / (grid[0] * grid[1])))
        calm = 0.5 ** (math.ceil(math.log2(max(1, n * grid[0] * grid[1]))) // 2)
        narrow1, narrow2 = w1.flatten(1).to(x.dtype), w2.flatten(1).to(x.dtype)
        bins, positive = pool(x, narrow1.contiguous(), b1, grid, down, keep)
        y = (bins.flatten(0, 2) @ narrow2.t()).view(n, *grid, len(w2))
        loss, dy, db2 = distance_and_gradient(
            y, b2, target, (height, width), distance, SQRT2 / down, calm if keep else None
        )
        if keep:
            ctx.save_for_backward(x, w1, b1, w2, b2, bins, positive, dy, db2)
            ctx.factors = (2 if distance == "mse" else 1) / max(1, target.numel()), calm, down
        return loss.to(torch.promote_types(x.dtype, target.dtype))

    @staticmethod
    def backward(ctx, g):
        if torch.is_grad_enabled():  # create_graph=True: a penalty on these gradients would read zero
            raise RuntimeError("feature_match is differentiable once only; leave it out of autograd.grad(create_graph)")
        x, w1, b1, w2, b2, bins, positive, dy, db2 = ctx.saved_tensors
        factor, calm, down = ctx.factors
        alpha = g.to(db2.dtype).reshape(1) * (factor / calm)
        need_x, need_w1, need_b1, need_w2, need_b2 = launch.wanted(ctx)[:5]
        rows, dx, dw1, db1, dw2 = dy.flatten(0, 2), None, None, None, None
        if need_w2:
            dw2 = (rows.t() @ bins.flatten(0, 2)).to(db2.dtype).mul_(alpha).to(w2.dtype).view_as(w2)
        if need_x or need_w1 or need_b1:
            dbins = (rows @ w2.flatten(1).to(x.dtype)).view_as(bins)
            if need_x:
                dx = pool_dx(x, dbins, positive, w1.flatten(1).to(x.dtype).contiguous(), alpha * down)
            if need_w1 or need_b1:
                dw1, db1 = pool_dw(x, dbins, positive, alpha * down)
                dw1, db1 = dw1.to(w1.dtype).view_as(w1), db1.to(b1.dtype)
        db2 = (db2 * (alpha * calm)).to(b2.dtype) if need_b2 else None
        return dx, dw1, db1, dw2, db2, None, None


def match(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, target: Tensor, distance: str) -> Tensor:
    """`feature_match` of checked arguments. x, and with it every product, may be narrower than the weights."""
    return _Match.apply(x, w1, b1, w2, b2, target, distance)
