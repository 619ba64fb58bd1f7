"""upfirdn2d in Triton: any rates and filter in one kernel, and `fir4` for the 4 separable taps of StyleGAN2.

Only taps that meet a sample are multiplied (polyphase): output i takes the taps t ≡ pad − down·i (mod up), each of the
sample (down·i + t − pad) / up.

Bytes moved per pixel and channel of the larger side, of b bytes a value: blur 2b; 2× up and down 1.25b (what is small
is a quarter). The backward pass is an upfirdn2d with up and down exchanged: the same bytes. Rows at the edges of strips
are read twice, in time for the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from hsrgan.kernels import blocks as table
from hsrgan.kernels import launch
from hsrgan.kernels.fir4_triton import Sides, accumulator, empty, is_nhwc, launch_fir4, output_size
from hsrgan.kernels.tiles import power_of_two, tile

Pair = tuple[int, int]


@triton.jit
def general(
    X, F, Y, channels, height, width, out_height, out_width, lead_y, lead_x, strips, blocks,
    x_n, x_c, x_h, x_w, y_n, y_c, y_h, y_w, f_y, f_x,
    FIR_GAIN: tl.constexpr, FLIP: tl.constexpr, SEPARABLE: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS × COLS pixels × CHANNELS. F is [TAPS_Y, TAPS_X], or SEPARABLE: [TAPS_Y] for both axes."""
    program = tl.program_id(0)
    groups = tl.cdiv(channels, CHANNELS)
    spot = program // groups
    n = (spot // blocks // strips).to(tl.int64)
    pixel = tl.arange(0, ROWS * COLS)
    i = ((spot // blocks) % strips) * ROWS + pixel // COLS
    j = (spot % blocks) * COLS + pixel % COLS
    ch = (program % groups).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    ch_ok = (ch < channels)[None, :]
    # the first tap that meets a sample (% may be negative: added once more), and that sample
    t_y = ((lead_y - DOWN_Y * i) % UP_Y + UP_Y) % UP_Y
    t_x = ((lead_x - DOWN_X * j) % UP_X + UP_X) % UP_X
    row = (DOWN_Y * i + t_y - lead_y) // UP_Y
    col = (DOWN_X * j + t_x - lead_x) // UP_X
    channel_at = (ch * x_c)[None, :]
    total = tl.zeros([ROWS * COLS, CHANNELS], ACC)
    for a in range(0, (TAPS_Y + UP_Y - 1) // UP_Y):
        tap_y = t_y + a * UP_Y
        row_ok = (tap_y < TAPS_Y) & (row + a >= 0) & (row + a < height)
        row_at = X + n * x_n + (row + a).to(tl.int64) * x_h
        f_row = (tap_y if FLIP else TAPS_Y - 1 - tap_y) * f_y
        for b in range(0, (TAPS_X + UP_X - 1) // UP_X):
            tap_x = t_x + b * UP_X
            ok = row_ok & (tap_x < TAPS_X) & (col + b >= 0) & (col + b < width)
            f_col = (tap_x if FLIP else TAPS_X - 1 - tap_x) * f_x
            if SEPARABLE:
                weight = tl.load(F + f_row, mask=ok, other=0.0).to(ACC) * tl.load(F + f_col, mask=ok, other=0.0).to(ACC)
            else:
                weight = tl.load(F + f_row + f_col, mask=ok, other=0.0).to(ACC)
            at = (row_at + (col + b).to(tl.int64) * x_w)[:, None] + channel_at
            total += weight[:, None] * tl.load(at, mask=ok[:, None] & ch_ok, other=0.0).to(ACC)
    out = Y + n * y_n + i.to(tl.int64) * y_h + j.to(tl.int64) * y_w
    ok = ((i < out_height) & (j < out_width))[:, None] & ch_ok
    tl.store(out[:, None] + (ch * y_c)[None, :], (total * FIR_GAIN).to(Y.dtype.element_ty), mask=ok)


def _general(x: Tensor, f: Tensor, y: Tensor, up: Pair, down: Pair, sides: Sides, flip: bool, gain: float) -> None:
    n, c, h, w = x.shape
    out_h, out_w = y.shape[2:]
    sizes = table.sizes("upfirdn2d", y)
    elements = sizes["num_warps"] * 32 * sizes["values"]
    cols, channels = tile(c, out_w, is_nhwc(y), elements)
    rows = min(power_of_two(out_h), max(1, elements // (cols * channels)))
    strips, blocks = -(-out_h // rows), -(-out_w // cols)
    launch.run(
        general,
        (n * strips * blocks * -(-c // channels),),
        x, f, y, c, h, w, out_h, out_w, sides[2], sides[0], strips, blocks,
        *x.stride(), *y.stride(), f.stride(0), f.stride(-1),
        FIR_GAIN=gain, FLIP=flip, SEPARABLE=f.ndim == 1, TAPS_Y=f.shape[0], TAPS_X=f.shape[-1],
        UP_Y=up[1], UP_X=up[0], DOWN_Y=down[1], DOWN_X=down[0],
        ROWS=rows, COLS=cols, CHANNELS=channels, ACC=accumulator(x),
        num_warps=sizes["num_warps"] if rows * cols * channels >= 512 else 1,
    )  # fmt: skip


def has_fast_path(f: Tensor, up: Pair, down: Pair) -> bool:
    """Does `fir4` compute it: 4 separable taps and a blur, 2× up or 2× down?"""
    return f.ndim == 1 and len(f) == 4 and (up, down) in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)))


def _resampled(
    x: Tensor, f: Tensor, up: Pair, down: Pair, sides: Sides, flip: bool, gain: float, nhwc: bool
) -> Tensor:
    """upfirdn2d(x) without a graph, channels_last if nhwc."""
    (x0, x1, y0, y1), (n, c, h, w) = sides, x.shape
    out_h = output_size(h, up[1], down[1], y0, y1, f.shape[0])
    out_w = output_size(w, up[0], down[0], x0, x1, f.shape[-1])
    y = empty(x, n, c, out_h, out_w, nhwc=nhwc)
    if has_fast_path(f, up, down):
        launch_fir4(x, f, y, up=up[0], down=down[0], sides=sides, flip=flip, gain=gain)
    else:
        _general(x, f, y, up, down, sides, flip, gain)
    return y


class UpFirDn(Function):
    """x, f → upfirdn2d(x), channels_last if nhwc. Differentiable any number of times in x: the gradient is one too."""

    @staticmethod
    def forward(ctx, x, f, up, down, sides, flip, gain, nhwc):
        ctx.save_for_backward(f)
        ctx.up, ctx.down, ctx.sides, ctx.flip, ctx.gain = up, down, sides, flip, gain
        ctx.size, ctx.nhwc = x.shape[2:], is_nhwc(x)
        return _resampled(x, f, up, down, sides, flip, gain, nhwc)

    @staticmethod
    def backward(ctx, g):
        (f,) = ctx.saved_tensors
        sides = adjoint_sides(ctx.sides, ctx.up, ctx.down, f, ctx.size, g.shape[2:])
        return UpFirDn.apply(g, f, ctx.down, ctx.up, sides, not ctx.flip, ctx.gain, ctx.nhwc), *[None] * 7


class Branch(Function):
    """x, f → (upfirdn2d(x), x), by `fir4`. Its gradient is a `Join`, whose gradient is a Branch: any order holds."""

    @staticmethod
    def forward(ctx, x, f, up, down, sides, flip, gain):
        ctx.save_for_backward(f)
        ctx.up, ctx.down, ctx.sides, ctx.flip, ctx.gain, ctx.size = up, down, sides, flip, gain, x.shape[2:]
        ctx.set_materialize_grads(False)
        return _resampled(x, f, up, down, sides, flip, gain, is_nhwc(x)), x.view_as(x)

    @staticmethod
    def backward(ctx, g, gx):
        (f,) = ctx.saved_tensors
        if g is not None:
            sides = adjoint_sides(ctx.sides, ctx.up, ctx.down, f, ctx.size, g.shape[2:])
            back = (f, ctx.down, ctx.up, sides, not ctx.flip, ctx.gain)
            gx = UpFirDn.apply(g, *back, is_nhwc(g)) if gx is None else Join.apply(g, gx, *back)
        return gx, *[None] * 6


class Join(Function):
    """x, other, f → upfirdn2d(x) + other, in one pass."""

    @staticmethod
    def forward(ctx, x, other, f, up, down, sides, flip, gain):
        ctx.save_for_backward(f)
        ctx.up, ctx.down, ctx.flip, ctx.gain = up, down, flip, gain
        ctx.sides = adjoint_sides(sides, up, down, f, x.shape[2:], other.shape[2:])
        y = torch.empty_like(other)
        launch_fir4(x, f, y, up=up[0], down=down[0], sides=sides, flip=flip, gain=gain, back="add", source=other)
        return y

    @staticmethod
    def backward(ctx, h):
        (f,) = ctx.saved_tensors
        return *Branch.apply(h, f, ctx.down, ctx.up, ctx.sides, not ctx.flip, ctx.gain), *[None] * 6


def adjoint_sides(sides: Sides, up: Pair, down: Pair, f: Tensor, size: torch.Size, out: torch.Size) -> Sides:
    """The paddings of the upfirdn2d that is the transpose of the one from `size` to `out` (height, width each)."""
    x0, _, y0, _ = sides
    x1 = size[1] * up[0] - out[1] * down[0] + x0 - up[0] + 1
    y1 = size[0] * up[1] - out[0] * down[1] + y0 - up[1] + 1
    return f.shape[-1] - 1 - x0, x1, f.shape[0] - 1 - y0, y1


def upfirdn2d_triton(
    x: Tensor, f: Tensor | None, up: Pair, down: Pair, sides: Sides, flip_filter: bool, gain: float
) -> Tensor:
    """`upfirdn2d`, its arguments checked."""
    f = x.new_ones(1) if f is None else f.detach()
    return UpFirDn.apply(x, f, up, down, sides, flip_filter, float(gain), is_nhwc(x))
