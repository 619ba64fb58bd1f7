"""How `fir4_kernels.fir4` is launched: tiles by size and dtype, paddings, where its sums go."""

import torch
import triton.language as tl
from torch import Tensor

from hsrgan.kernels import blocks as table
from hsrgan.kernels import launch
from hsrgan.kernels.fir4_kernels import fir4
from hsrgan.kernels.tiles import is_nhwc, power_of_two, tile

Sides = tuple[int, int, int, int]
SUMS = ("v", "product", "noise", "back", "style")


def accumulator(t: Tensor) -> tl.dtype:
    """The type sums are kept in: fp64 for fp64, else fp32."""
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def empty(like: Tensor, *shape: int, nhwc: bool) -> Tensor:
    """Uninitialised [N, C, H, W], channels_last if nhwc, of the dtype and on the device of `like`."""
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def output_size(size: int, up: int, down: int, before: int, after: int, taps: int) -> int:
    """Pixels along one axis that upfirdn2d returns."""
    return (size * up + before + after - taps) // down + 1


def centre(sides: Sides) -> int:
    """The tap at which a blur with these paddings counts an input pixel as its program's own; −1: no tap does."""
    x0, x1, y0, y1 = sides
    tap = min(3, x0, y0)
    return tap if min(x1, y1) >= 3 - tap else -1


def _shape(y: Tensor, steps_y: int, columns: int, kernel: str) -> dict[str, int | None]:
    """ROWS, UNROLL, SPAN, COLS, CHANNELS, num_warps and registers: the table's, and fewer where y is small.

    columns: to be made two at a time, or as many as the table's span says.
    """
    n, c = y.shape[:2]
    sizes = table.sizes(kernel, y)
    values, span = sizes["values"], sizes.get("span", 2)
    steps_x = -(-columns // span)
    cols, channels = tile(c, steps_x, is_nhwc(y), sizes["num_warps"] * 32 * values)
    rows = min(sizes["rows"], max(2, power_of_two(steps_y)))
    while rows > 8 and n * -(-c // channels) * -(-steps_x // cols) * -(-steps_y // rows) < 2048:
        rows //= 2
    warps = min(sizes["num_warps"], max(1, cols * channels // (32 * values)))
    return {
        "ROWS": rows, "UNROLL": sizes["unroll"], "SPAN": span, "COLS": cols, "CHANNELS": channels, "num_warps": warps,
        "registers": sizes.get("registers"),
    }  # fmt: skip


def launch_fir4(
    x: Tensor,
    f: Tensor,
    y: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    sides: Sides,
    flip: bool,
    gain: float,
    front: str = "none",
    back: str = "none",
    chain: dict[str, object] | None = None,
    of_y: bool = True,
    source: Tensor | None = None,
    other: Tensor | None = None,
    y2: Tensor | None = None,
    bias: Tensor | None = None,
    demod: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    add: Tensor | None = None,
    noise_add: Tensor | None = None,
    source_add: Tensor | None = None,
    style: Tensor | None = None,
    sums: tuple[str, ...] = (),
) -> list[Tensor]:
    """Fill y (and y2, of the same strides) from x [N, C, H, W] and f [4]; the sums asked for, [N, C] each, in fp32.

    bias [C]; demod, add, noise_add, source_add, style [N, C]; noise [N or 1, 1, …] of y's size (of x's for the sum
    "noise").
    """
    n, c, h, w = x.shape
    out_h, out_w = y.shape[2:]
    x0, _, y0, _ = sides
    if up == 2:
        # an odd padding starts at the second output of a pair: the first is skipped
        skip_x, skip_y = x0 % 2, y0 % 2
        lead_x, lead_y = (x0 + 1) // 2, (y0 + 1) // 2
        columns, steps_y = out_w + skip_x, (out_h + skip_y + 1) // 2
    else:
        skip_x, skip_y, lead_x, lead_y = 0, 0, x0, y0
        columns, steps_y = (2 * out_w if down == 2 else out_w), out_h
    behind = {"slope": "source", "tangent": "tangent", "add": "join"}.get(back, "blur")
    kind = {"activate": "chain", "slope": "slope"}.get(front, behind)
    kind = "resample" if max(up, down) > 1 and kind == "blur" else kind
    shape = _shape(y, steps_y, columns, f"fir4.{kind}")
    if shape["registers"] and not is_nhwc(x):
        shape["registers"] = 255  # values one by one have an address each
    strips, blocks = -(-steps_y // shape["ROWS"]), -(-columns // (shape["SPAN"] * shape["COLS"]))
    planes = len(sums)
    partial = None
    if sums:
        wide = torch.promote_types(x.dtype, torch.float32)
        partial = torch.empty(planes, n, strips * blocks, c, dtype=wide, device=x.device)
    source_strides = (0, 0, 0, 0) if source is None else source.stride()
    other_strides = (0, 0, 0, 0) if other is None else other.stride()
    noise_strides = (0, 0, 0)
    if noise is not None:
        noise_strides = (noise.stride(0) if noise.shape[0] > 1 else 0, noise.stride(2), noise.stride(3))
    reach = max(t.stride(1) * c + t.stride(3) * (max(w, out_w) + 8) for t in (x, y, source, other) if t is not None)
    launch.run(
        fir4,
        (n * strips * blocks * -(-c // shape["CHANNELS"]),),
        x, f.contiguous(), y, y2, source, other, _dense(bias), _dense(demod), noise, strength, _dense(add),
        _dense(noise_add), _dense(source_add), _dense(style), partial,
        n * strips * blocks * c, c, h, w, out_h, out_w, lead_y, lead_x, skip_y, skip_x, strips, blocks,
        *x.stride(), *y.stride(), *source_strides, *other_strides, *noise_strides,
        FIR_GAIN=gain, FLIP=flip, UP=up, DOWN=down, CENTRE=max(0, centre(sides)) if front == "slope" else 3,
        FRONT=front, BACK=back, OF_Y=of_y,
        **(chain or {"ACT": "lrelu", "SLOPE": 1.0, "GAIN": 1.0, "CLAMP": None}),
        **{f"SUM_{name.upper()}": name in sums for name in SUMS},
        EVEN=c % shape["CHANNELS"] == 0, WIDE=reach >= 2**31, ACC=accumulator(x),
        **shape,
    )  # fmt: skip
    return [] if partial is None else list(partial.sum(2))


def _dense(t: Tensor | None) -> Tensor | None:
    """A small tensor of one value a channel."""
    return None if t is None else t.contiguous()
