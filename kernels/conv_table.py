"""Which convolution runs on the library and which on the Triton implicit GEMM, and in what tiles: a static table.

convolutions.json holds what was measured, a row for a shape, a kind of product and an architecture, with the device and
the day: tools/tune_kernels.py --kernel convolution writes it. Where it has no row a rule decides, from the arithmetic
alone; no device has been measured yet.

    gemm      at most 64 channels in and out, resolution ≥ 512, half precision, a chip whose tiles are in TILES, and
              something to fuse: there a layer is bound by memory, and prologue and epilogue spare passes over it
    library   everything else: cuDNN and MIOpen reach more of the matrix units than Triton does

Weight gradients ("3x3 dw") have a kernel, a rule and sizes of their own: `conv_wgrad_triton.fits`, `.blocks`.

By the floors of all that is launched (H200's data sheet; `python tools/bench_kernels.py` without a GPU prints them),
forward at 1024² and batch 8, GEMM against library: G's conv1 231 and 678 µs, conv0 399 and 511, D's fromRGB 122 and
346, conv1 + skip 504 and 560; D's conv0 and skip, with nothing to fuse, the same.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from hsrgan.kernels import launch

PATH = Path(__file__).with_name("convolutions.json")
IMPLEMENTATIONS = ("gemm", "library")
CHANNELS, RESOLUTION = 64, 512  # of the rule


class Tile(NamedTuple):
    """What one program of the GEMM works on, and with."""

    pixels: int
    outputs: int  # channels
    inputs: int  # channels a step
    warps: int
    stages: int


class Shape(NamedTuple):
    """A class of convolutions. form: "1x1", "3x3", "3x3 down" (stride 2), "3x3 up" (transposed, stride 2), and with
    "dw" behind it a weight gradient, by the sides of its convolution."""

    form: str
    inputs: int  # channels
    outputs: int
    resolution: int  # the largest power of two in the height of the larger side
    fused: bool  # a style, a pointwise tail or a style's gradient beside it; dw: scales

    @classmethod
    def of(
        cls, k: int, stride: int, transposed: bool, inputs: int, outputs: int, height: int, fused: bool,
        dw: bool = False,
    ) -> "Shape":  # fmt: skip
        form = f"{k}x{k}" + ("" if stride == 1 else " up" if transposed else " down") + (" dw" if dw else "")
        return cls(form, inputs, outputs, 1 << max(0, height.bit_length() - 1), fused)


class Row(NamedTuple):
    """A measurement: the faster implementation, and the GEMM's tile (none of a weight gradient)."""

    shape: Shape
    kind: str  # of product: launch.kind_of
    chip: str
    run: str
    tile: Tile | None
    source: str


def read(path: Path = PATH) -> tuple[Row, ...]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return tuple(
        Row(Shape(*r["shape"]), r["kind"], r["chip"], r["run"], r["tile"] and Tile(*r["tile"]), r["source"])
        for r in rows
    )


def text(rows: Iterable[Row]) -> str:
    """What `read` reads: a row a line."""
    lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


Key = tuple[Shape, str, str]  # shape, kind, chip
_measured: dict[Key, Row] = {(row.shape, row.kind, row.chip): row for row in read()}
_asked: list[Key] | None = None


@contextmanager
def using(rows: Iterable[Row], *, alone: bool = False) -> Iterator[list[Key]]:
    """Inside the block these rows come first, or are all there are. The list fills with what is looked up."""
    global _measured, _asked
    before = _measured, _asked
    _measured = ({} if alone else _measured) | {(row.shape, row.kind, row.chip): row for row in rows}
    _asked = []
    try:
        yield _asked
    finally:
        _measured, _asked = before


def measured(shape: Shape, dtype: torch.dtype, chip: str) -> Row | None:
    """What the table says; None: a rule decides, as it always does for fp64 (tests, no training)."""
    if dtype.itemsize == 8:
        return None
    key = (shape, launch.kind_of(dtype), chip)
    if _asked is not None:
        _asked.append(key)
    return _measured.get(key)


# By kind of product and architecture: tiles by the output channels of a program. From builds, not from measurements:
# what neither spills nor asks for more shared memory than the chip has (`python tests/conv_builds.py` prints them).
TILES: dict[tuple[str, str], tuple[Tile, ...]] = {
    ("half", "sm_80"): (Tile(128, 128, 32, 8, 4), Tile(128, 64, 32, 4, 4), Tile(128, 32, 32, 4, 4)),
    ("half", "sm_90"): (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(128, 32, 32, 4, 4)),
    ("half", "sm_100"): (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(128, 32, 32, 4, 4)),
    ("half", "gfx942"): (Tile(128, 128, 32, 8, 2), Tile(128, 64, 32, 4, 2), Tile(128, 32, 32, 4, 2)),
    ("tf32", ""): (Tile(64, 64, 32, 4, 2),),
    ("ieee", ""): (Tile(64, 32, 16, 4, 2),),
    ("fp64", ""): (Tile(32, 32, 16, 4, 2),),
}

_forced = os.environ.get("HSRGAN_CONV") or None


@contextmanager
def use_convolution(name: str) -> Iterator[None]:
    """Inside the `with` block the triton backend convolves by "gemm" or by "library" alone, as HSRGAN_CONV says it."""
    global _forced
    launch.check(name in IMPLEMENTATIONS, f"unknown convolution {name!r}; there are: {', '.join(IMPLEMENTATIONS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The one implementation that `use_convolution` or HSRGAN_CONV allows; None: the table decides."""
    if _forced not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"unknown convolution {_forced!r}; HSRGAN_CONV takes one of: {', '.join(IMPLEMENTATIONS)}")
    return _forced


def choose(shape: Shape, dtype: torch.dtype, chip: str) -> Tile | None:
    """The tile of the GEMM, or None for the library. chip: of `launch.chip`."""
    only = forced()
    if only == "library":
        return None
    if only is None:
        if (row := measured(shape, dtype, chip)) is not None:
            return row.tile
        few = max(shape.inputs, shape.outputs) <= CHANNELS and shape.resolution >= RESOLUTION
        if not (few and shape.fused and dtype.itemsize == 2 and ("half", _architecture(chip)) in TILES):
            return None
    return default_tile(shape, dtype, chip)


def default_tile(shape: Shape, dtype: torch.dtype, chip: str) -> Tile:
    """The narrowest tile of TILES that holds all outputs, else the widest; on an unknown chip what fits every one."""
    found = tiles("fp64" if dtype.itemsize == 8 else launch.kind_of(dtype), chip)
    return next((tile for tile in reversed(found) if tile.outputs >= shape.outputs), found[0])


def tiles(kind: str, chip: str) -> tuple[Tile, ...]:
    """Those of a kind of product, on an unknown chip those that fit every one."""
    return TILES[kind, (_architecture(chip) or "gfx942") if kind == "half" else ""]


def _architecture(chip: str) -> str:
    """The architecture in TILES whose tiles a chip takes; "" where there is none."""
    for prefix, name in {"sm_8": "sm_80", "sm_9": "sm_90", "sm_10": "sm_100", "gfx94": "gfx942"}.items():
        if chip.startswith(prefix):
            return name
    return ""
