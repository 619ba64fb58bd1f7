"""`feature_match` on a GPU: how its Triton kernels are cut and launched, and the autograd Function around them.

Sums over bins (feature_pool_triton) → second convolution, a matrix product of the library's on N·h'·w' rows → distance
and its gradient (feature_distance_triton). The product is the library's: fusing it with the distance would only save a
pass over its result (5 MB at 16 images of 14×14×768, about 2 µs of an H200's bandwidth), and the cosine needs whole
rows of it, which a tile does not hold.
"""

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from hsrgan.kernels import blocks as table
from hsrgan.kernels import launch
from hsrgan.kernels.bias_act import SQRT2
from hsrgan.kernels.feature_distance_triton import distance_and_gradient
from hsrgan.kernels.feature_pool_triton import dw_kernel, dx_kernel, pool_kernel
from hsrgan.kernels.products import products

PROGRAMS = 128  # a grid smaller than this leaves multiprocessors idle (an H200 has 132, an A100 108), so it is split


@dataclass(frozen=True)
class Tiles:
    """How an image of H×W pixels and its grid of h×w bins are cut: the constants of the kernels above."""

    images: int  # NI
    rows: int  # R
    columns: int  # WB
    bins: int  # JB
    chunks: int  # of WB columns in a row

    @staticmethod
    def of(x: Tensor, grid: tuple[int, int], pixels: int, *, whole_bins: bool) -> "Tiles":
        """At most `pixels` a tile. whole_bins: JB bin columns with all their pixels; else all that WB columns touch."""
        (n, _, height, width), (h, w), limits = x.shape, grid, product_blocks("tiles", x)
        members = limits["members"]
        most = max(16, members // 2)
        columns = min(limits["columns"], max(16, triton.next_power_of_2(width)))
        while columns > 16 and _bins_in(columns, width, w) > most:
            columns //= 2  # never depends on `pixels`: the bits are laid out by it
        bins = triton.next_power_of_2(min(w, most) if whole_bins else _bins_in(columns, width, w))
        rows = images = 1
        while 2 * rows <= height // h and 2 * rows * columns <= pixels:
            rows *= 2
        while images < min(n, 4) and 2 * images * rows * columns <= pixels and 2 * images * bins <= members:
            images *= 2
        return Tiles(images, rows, columns, max(bins, 16 // images), -(-width // columns))

    @property
    def constants(self) -> dict[str, int]:
        return {"NI": self.images, "R": self.rows, "WB": self.columns, "JB": self.bins}


def _bins_in(columns: int, width: int, w: int) -> int:
    """The most bins of w over `width` pixels that any aligned chunk of so many columns touches."""
    starts = range(0, width, columns)
    return max(-(-min(s + columns, width) * w // width) - s * w // width for s in starts)


def product_blocks(kernel: str, x: Tensor) -> dict[str, int]:
    """The table's sizes of "pool", "dx" or "dw" for x. Its classes of shapes: "<kind> narrow|middle|wide[ ragged]"."""
    c = x.shape[1]
    width = "narrow" if c <= 64 else "middle" if c <= 256 else "wide"
    shape = f"{launch.kind_of(x.dtype)} {width}" + (" ragged" if c % 16 else "")
    sizes = table.sizes(f"feature_match.{kernel}", x, shape)
    if "BC" in sizes:
        sizes["BC"] = min(sizes["BC"], max(16, triton.next_power_of_2(c)))
    return sizes


def pool(x: Tensor, w1: Tensor, b1: Tensor, grid: tuple[int, int], scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    """(scale·Σ over each bin of relu(w1 ⋆ x + b1) [N, h, w, K] of x's dtype, the bits). w1 [K, C] of x's dtype."""
    (n, c, height, width), (h, w), k, blocks = x.shape, grid, len(w1), product_blocks("pool", x)
    tiles = Tiles.of(x, grid, blocks.pop("pixels"), whole_bins=True)
    bins = x.new_empty(n, h, w, k)
    row_bytes = tiles.chunks * tiles.columns // 8
    positive = x.new_empty((n, height, row_bytes, k) if keep else (1,), dtype=torch.uint8)
    along_k, groups, col_parts = -(-k // blocks["BN"]), -(-n // tiles.images), -(-w // tiles.bins)
    row_parts = max(1, min(h, PROGRAMS // max(1, along_k * groups * col_parts)))
    bin_rows = -(-h // row_parts)
    row_parts = -(-h // bin_rows)
    launch.run(
        pool_kernel, (along_k, groups * row_parts * col_parts), x, w1, b1, bins, positive, n, c, height, width, k, h, w,
        *x.stride(), *w1.stride(), scale, bin_rows, row_parts, col_parts, row_bytes, **tiles.constants,
        NC=-(-c // blocks["BC"]), SHARED=height % h != 0 or height // h % tiles.rows != 0, KEEP=keep,
        **products(x), **blocks,
    )  # fmt: skip
    return bins, positive


def pool_dx(x: Tensor, dbins: Tensor, positive: Tensor, w1: Tensor, alpha: Tensor) -> Tensor:
    """The gradient of x from that of the bins; everything scaled by alpha [1]."""
    (n, c, height, width), (_, h, w, k), blocks = x.shape, dbins.shape, product_blocks("dx", x)
    tiles = Tiles.of(x, (h, w), blocks.pop("pixels"), whole_bins=False)
    dx = torch.empty_like(x)
    row_tiles = -(-height // tiles.rows)
    programs = -(-n // tiles.images) * row_tiles * tiles.chunks
    launch.run(
        dx_kernel, (-(-c // blocks["BC"]), programs), dbins, positive, w1, alpha, dx, n, c, height, width, k, h, w,
        *dx.stride(), *w1.stride(), row_tiles, tiles.chunks, positive.shape[2],
        **tiles.constants, **products(x), **blocks,
    )  # fmt: skip
    return dx


def pool_dw(x: Tensor, dbins: Tensor, positive: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of w1 [K, C] and b1 [K], in fp32 (fp64 for fp64), from that of the bins; scaled by alpha [1]."""
    (n, c, height, width), (_, h, w, k), blocks = x.shape, dbins.shape, product_blocks("dw", x)
    tiles = Tiles.of(x, (h, w), blocks.pop("pixels"), whole_bins=False)
    along_k, along_c, row_tiles = -(-k // blocks["BN"]), -(-c // blocks["BC"]), -(-height // tiles.rows)
    count = -(-n // tiles.images) * row_tiles * tiles.chunks
    a_split = max(1, -(-count // max(1, PROGRAMS // (along_k * along_c))))
    splits = -(-count // a_split)
    dw, db = x.new_empty(splits, k, c, dtype=alpha.dtype), x.new_empty(splits, k, dtype=alpha.dtype)
    launch.run(
        dw_kernel, (along_k, along_c, splits), x, dbins, positive, dw, db, n, c, height, width, k, h, w, *x.stride(),
        row_tiles, tiles.chunks, positive.shape[2], count, a_split, **tiles.constants, **products(x), **blocks,
    )  # fmt: skip
    return (dw[0] if splits == 1 else dw.sum(0)).mul_(alpha), db.sum(0).mul_(alpha)


class _Match(torch.autograd.Function):
    """The distance; keeps its gradient to y, the sums (N·h'·w'·K values) and a bit a hidden value. First order."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, target, distance):
        n, _, height, width = x.shape
        grid = (min(height, target.shape[2]), min(width, target.shape[3]))
        keep = any(ctx.needs_input_grad[:5])
        # powers of two, exact: sums of many pixels, and gradients of many rows, stay within half precision's range
        down = 0.5 ** round(math.log2(height * width / (grid[0] * grid[1])))
        calm = 0.5 ** (math.ceil(math.log2(max(1, n * grid[0] * grid[1]))) // 2)
        narrow1, narrow2 = w1.flatten(1).to(x.dtype), w2.flatten(1).to(x.dtype)
        bins, positive = pool(x, narrow1, b1.contiguous(), grid, down, keep)
        y = (bins.flatten(0, 2) @ narrow2.t()).view(n, *grid, len(w2))
        loss, dy, db2 = distance_and_gradient(
            y, b2.contiguous(), target, (height, width), distance, SQRT2 / down, calm if keep else None
        )
        if keep:
            ctx.save_for_backward(x, w1, b1, w2, b2, bins, positive, dy, db2)
            ctx.factors = (2 if distance == "mse" else 1) / max(1, target.numel()), calm, down
        return loss.to(torch.promote_types(x.dtype, target.dtype))

    @staticmethod
    @launch.once_differentiable("feature_match")
    def backward(ctx, g):
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
                dx = pool_dx(x, dbins, positive, w1.flatten(1).to(x.dtype), alpha * down)
            if need_w1 or need_b1:
                dw1, db1 = pool_dw(x, dbins, positive, alpha * down)
                dw1, db1 = dw1.to(w1.dtype).view_as(w1), db1.to(b1.dtype)
        db2 = (db2 * (alpha * calm)).to(b2.dtype) if need_b2 else None
        return dx, dw1, db1, dw2, db2, None, None


def match(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, target: Tensor, distance: str) -> Tensor:
    """`feature_match` of checked arguments. x, and with it every product, may be narrower than the weights."""
    return _Match.apply(x, w1, b1, w2, b2, target, distance)
