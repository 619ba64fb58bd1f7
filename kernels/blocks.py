"""Tile sizes, warps and stages of the Triton kernels: one static table, blocks.json, the first row that fits.

A row says for which kernel, class of shapes, bytes of a value and chip it stands (patterns: "sm_8*", "*"), the sizes,
and where they come from: "rule" (what this page says), "ahead-of-time builds" (the most that neither spills nor asks
for more shared memory than the chip has), or a measurement with its device and date, which tools/tune_kernels.py puts
before the rules. Nothing is tuned at run time: all ranks read the same file.

    bias_act, to_rgb, bias_act_to_rgb     elements: values in a tile; num_warps. 8 to 16 values a thread, of every
        operand and of every running sum: launches that keep several sums (bias_act.sums, the gradients of toRGB)
        have the smaller tile. toRGB forward has 32 in half precision, and 64 alone, as what it does once a pixel costs
        as much as the channels; 16 at most where its sums outlast a block of channels (tiles.tile_of_sums). On sm_90
        that is 24 to 91 registers without such sums, 126 with, up to 96 with bias_act's four, 193 with toRGB's own and
        the next style's: in half precision held to 168, so that three blocks share a multiprocessor, not two (on
        sm_100 that spills).
    fir4, upfirdn2d     values a thread holds of a row; span: columns of a blur that it makes side by side; unroll: rows
        in flight; rows a program makes, at most (3 more are read); num_warps at most. Without work at the taps (blur,
        resample; source, tangent, join: more tensors behind the FIR) 16 bytes a thread and pairs of columns. With it
        (chain: an activation, slope: a second tensor) a pixel is worked on by every thread whose taps reach it: 2.5
        times a column in pairs, 1.75 times in fours, at 8 bytes a thread in half precision. `registers` is what the
        fours or the second tensor ask for on every chip; left alone ptxas spills the resampling.
    demodulation      outputs, inputs, samples of a tile at most, powers of two; num_warps. 32 values of a weight a
        thread, padded taps among them: twice as many spill on sm_90. modulate holds all inputs of a layer at once
        where 512 do, and takes four outputs together where the transposed cast has them side by side. columns: all
        outputs in few turns, and programs for two samples each, of which a batch of 8 would else give too few.
    feature_match     pixels of a tile, BN, BC, BK at most; columns: of a tile, members: (image, bin column) pairs, the
        width of the product that pools; an ieee product takes ordinary multipliers and whole rows in registers, hence
        so narrow. The weights of a pool program stay on the chip where shared memory holds them beside two tiles of x:
        streaming both asks twice as much of the L2. What fits gfx942's 64 kB fits everywhere. dw, narrow or ragged:
        short vectors cost addresses, hence registers.
    styles      ROWS of one layer, SAMPLES and FEATURES of a tile: enough programs for a chip, small products.

registers: what a thread may take on NVIDIA. fp64 (tests, no training) takes the row of fp32 with half the values.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from hsrgan.kernels import launch

PATH = Path(__file__).with_name("blocks.json")
LARGE = 128 * 128  # pixels of an image from which on bytes, not launches, are the cost


@dataclass(frozen=True)
class Row:
    kernel: str
    shape: str
    bytes: tuple[int, ...]
    chip: str
    sizes: tuple[tuple[str, int], ...]
    source: str

    def fits(self, kernel: str, shape: str, size: int, chip: str) -> bool:
        return (
            self.kernel == kernel and size in self.bytes and fnmatchcase(shape, self.shape)
            and fnmatchcase(chip, self.chip)
        )  # fmt: skip


def read(path: Path = PATH) -> tuple[Row, ...]:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Row(**r | {"bytes": tuple(r["bytes"]), "sizes": tuple(r["sizes"].items())}) for r in rows)


def text(rows: Iterable[Row]) -> str:
    """What `read` reads: a row a line."""
    lines = [json.dumps(row.__dict__ | {"sizes": dict(row.sizes)}, ensure_ascii=False) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


_rows = read()
_asked: list[tuple[str, str, int, str]] | None = None


@contextmanager
def using(rows: Iterable[Row]) -> Iterator[list[tuple[str, str, int, str]]]:
    """Inside the block these rows come first. The list fills with what is looked up: kernel, shape, bytes, chip."""
    global _rows, _asked
    before = _rows, _asked
    _rows, _asked = (*rows, *_rows), []
    row_for.cache_clear()
    try:
        yield _asked
    finally:
        _rows, _asked = before
        row_for.cache_clear()


@functools.cache
def row_for(kernel: str, shape: str, size: int, chip: str) -> Row:
    """The first row that fits. LookupError if none does: the table must end in rules that fit every chip."""
    for row in _rows:
        if row.fits(kernel, shape, size, chip):
            return row
    raise LookupError(f"{PATH.name} has no row for {kernel} of shape {shape!r}, {size} bytes, on {chip or 'any chip'}")


def sizes(kernel: str, x: Tensor, shape: str = "") -> dict[str, Any]:
    """The sizes of a kernel for activations like x [N, C, …]; shape: "large" or "small" by its pixels unless given."""
    shape = shape or ("large" if x.shape[2:].numel() >= LARGE else "small")
    key = (kernel, shape, min(4, x.element_size()), launch.chip(x))
    if _asked is not None:
        _asked.append(key)
    found = dict(row_for(*key).sizes)
    if x.element_size() == 8:
        found |= {name: max(1, found[name] // 2) for name in ("elements", "values") if name in found}
    return found
