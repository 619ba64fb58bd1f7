"""Which convolution is the faster on this GPU: what tools/tune_kernels.py measures for kernels/convolutions.json.

Timed is the op of a layer as a whole, forward or with its gradients, because what the GEMM spares are passes beside it.
Layers of 512 channels are left to the library by the rule alone: they are bound by arithmetic, where it is the faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hsrgan import kernels
from hsrgan.kernels import conv_table, launch
from hsrgan.kernels.conv_table import Key, Row, Tile
from hsrgan.tools import kernel_shapes, kernel_timing
from hsrgan.tools.kernel_timing import Case

BATCH = 8
PLACES = ((32, 1024), (64, 512), (128, 256), (64, 256), (256, 128), (128, 128))  # channels, resolution
DTYPE = torch.float16


@dataclass(frozen=True)
class Slot:
    """One thing that the table is asked, what is answered today, and a case that asks it."""

    key: Key
    today: Row
    case: Case


def slots(chip: str, places: Iterable[tuple[int, int]] = PLACES) -> list[Slot]:
    """What the layers ask the table on a chip, each once, at its first layer. Nothing runs."""
    found: dict[Key, Slot] = {}
    for channels, resolution in places:
        calls = [*kernel_shapes.convolution(BATCH, channels, resolution),
                 *kernel_shapes.weight_gradient(BATCH, channels, resolution)]  # fmt: skip
        for call in calls:
            for mode in ("forward", "backward"):
                case = Case(call, DTYPE, mode)
                with conv_table.using(()) as asked, launch.record(chip) as launches:
                    kernel_timing.prepare(case, getattr(kernels, call.op), call.make(DTYPE))()
                of_ours = any(each.kernel.__name__ == "wgrad_kernel" for each in launches)
                for key in set(asked) - found.keys():
                    tile = None if key[0].form.endswith("dw") else conv_table.choose(key[0], DTYPE, chip)
                    run = "gemm" if tile is not None or (key[0].form.endswith("dw") and of_ours) else "library"
                    found[key] = Slot(key, Row(*key, run, tile, ""), case)
    return list(found.values())


def candidates(today: Row, source: str) -> list[Row]:
    """Today's choice, then the others: the library, and each tile of the architecture, the default one with a stage
    less and more."""
    shape, kind, chip = today[:3]
    runs: list[tuple[str, Tile | None]] = [(today.run, today.tile), ("library", None)]
    if shape.form.endswith("dw"):
        runs.append(("gemm", None))
    else:
        default = conv_table.default_tile(shape, DTYPE, chip)
        near = [default._replace(stages=default.stages + more) for more in (-1, 1)]
        runs += [("gemm", tile) for tile in (*conv_table.tiles(kind, chip), *near)]
    return [Row(shape, kind, chip, run, tile, source) for run, tile in dict.fromkeys(runs)]


def tune(
    slot: Slot, device: str, stopwatch: Callable[[Callable[[], Any]], dict[str, float]], source: str
) -> tuple[Row | None, str]:
    """(the row to write, or None if today's choice is as good; what happened, in words)."""
    best, what = kernel_timing.fastest(
        slot.case, candidates(slot.today, source), lambda row: conv_table.using([row]), device, stopwatch,
        f"convolution {tuple(slot.key[0])}, {slot.today.run}",
    )  # fmt: skip
    return best, what if best is None else f"{what} by {best.run} {tuple(best.tile or ())}"


def merged(rows: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """New rows in place of older ones for the same shape, kind and chip."""
    return list({row[:3]: row for row in (*rows, *new)}.values())
